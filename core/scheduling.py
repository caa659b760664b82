"""Which group a worker takes next. Pure policy; the queue's scripts only move jobs.

Drain the group whose weights are fused; then take the oldest job's group that no other worker is running; but never
idle while anything may be claimed. A group is not eligible when taking it would pass a job that later work has
overtaken by ``slack`` already: the snapshot says so, and the claim enforces it again, because a snapshot is stale
by the time it is used.

Evidence for drain-then-oldest: reordering-buffer management (Räcke et al. 2002). Tags are start-time fair queueing
(Goyal, Vin and Cheng 1996).
"""

from __future__ import annotations

from dataclasses import dataclass

WINDOW = 256
"""Oldest ready jobs that one decision looks at. Bounds the work of a snapshot and of a claim."""

DEFAULT_SLACK_JOBS = 64
"""``slack`` in jobs of ``NOMINAL_COST``, when the operator sets none."""

NOMINAL_COST = 20 * 512 * 512
"""Cost of a common job: 20 steps at 512 × 512, one image."""


@dataclass(frozen=True, slots=True)
class GroupView:
    """What a decision needs to know of one group: its ready jobs within the window."""

    group: str
    head_tag: float
    """Fair-queueing tag of its oldest ready job."""
    head_seq: int
    ready: int
    """Its ready jobs within the window."""
    overtaken_ahead: float
    """Largest ``overtaken_by`` among the ready jobs of other groups that are older than this group's head."""
    others: int = 0
    """Other workers that hold a lease on this group."""
    suspect: bool = False
    """Its head job's last lease was lost: it will run alone."""


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The groups of the oldest ready jobs, oldest head first."""

    groups: tuple[GroupView, ...] = ()


def choose(snapshot: Snapshot, *, fused: str | None, slack: float) -> str | None:
    """Name the group to claim from, or ``None`` when nothing is ready.

    ``fused`` is the group whose weights the worker holds; ``slack`` is in cost units.
    """
    if not snapshot.groups:
        return None
    eligible = [view for view in snapshot.groups if view.overtaken_ahead < slack]
    if not eligible:
        return snapshot.groups[0].group
    for view in eligible:
        if view.group == fused:
            return view.group
    for view in eligible:
        if view.others == 0:
            return view.group
    return eligible[0].group
