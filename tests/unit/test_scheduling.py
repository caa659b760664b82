"""Which group a worker takes next."""

from __future__ import annotations

import itertools

from hypothesis import given
from hypothesis import strategies as st

from core.scheduling import GroupView, Snapshot, choose

SLACK = 100.0


def snapshot(*views: GroupView) -> Snapshot:
    return Snapshot(views)


def view(group: str, *, overtaken: float = 0.0, others: int = 0) -> GroupView:
    return GroupView(group, head_tag=0.0, head_seq=0, ready=1, overtaken_ahead=overtaken, others=others)


def test_nothing_ready_is_nothing_to_do() -> None:
    assert choose(snapshot(), fused="a", slack=SLACK) is None


def test_the_fused_group_is_drained_first() -> None:
    groups = snapshot(view("a"), view("b"), view("c"))

    assert choose(groups, fused="c", slack=SLACK) == "c"


def test_the_fused_group_is_drained_even_if_another_worker_runs_it_too() -> None:
    groups = snapshot(view("a"), view("b", others=1))

    assert choose(groups, fused="b", slack=SLACK) == "b"


def test_without_a_fused_group_the_oldest_that_no_other_worker_runs_is_taken() -> None:
    groups = snapshot(view("a", others=1), view("b"), view("c"))

    assert choose(groups, fused=None, slack=SLACK) == "b"
    assert choose(groups, fused="gone", slack=SLACK) == "b"


def test_no_worker_idles_because_others_run_every_group() -> None:
    groups = snapshot(view("a", others=2), view("b", others=1))

    assert choose(groups, fused=None, slack=SLACK) == "a"


def test_the_fused_group_is_left_when_an_older_job_was_overtaken_enough() -> None:
    groups = snapshot(view("a"), view("b", overtaken=SLACK))

    assert choose(groups, fused="b", slack=SLACK) == "a"
    assert choose(groups, fused="b", slack=SLACK + 1) == "b"


def test_without_slack_the_oldest_group_is_taken() -> None:
    groups = snapshot(view("a", others=1), view("b"))

    assert choose(groups, fused="b", slack=0.0) == "a"


@given(
    overtaken=st.lists(st.floats(0, 200), max_size=6),
    others=st.lists(st.integers(0, 2), min_size=6, max_size=6),
    fused=st.sampled_from([None, "g0", "g3", "g5"]),
)
def test_a_choice_passes_no_job_that_has_its_slack_already(
    overtaken: list[float], others: list[int], fused: str | None
) -> None:
    # Given groups as a snapshot shows them: what was overtaken most ahead of one is ahead of the next, too
    ahead = list(itertools.accumulate(overtaken, max, initial=0.0))
    groups = [view(f"g{i}", overtaken=ahead[i], others=others[i]) for i in range(len(overtaken))]

    # If
    chosen = choose(snapshot(*groups), fused=fused, slack=SLACK)

    # Expect
    assert (chosen is None) == (not groups)
    assert all(group.overtaken_ahead < SLACK for group in groups if group.group == chosen)
