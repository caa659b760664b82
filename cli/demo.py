"""The main job, shown: jobs over several LoRA sets go in shuffled and come out as pictures, fused rarely."""

from __future__ import annotations

import itertools
import json
import random
import shutil
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from cli.sheet import contact_sheet
from cli.stack import Stack
from core.errors import EngineFailed

POLL_S = 0.25
PATIENCE_S = 30.0
"""How long an API that gives no answer is asked again."""
DEMO_TIMEOUT_S = 600.0
SHUFFLE_SEED = 20
"""Makes each demo's arrival order the same."""


@dataclass(frozen=True, slots=True)
class DemoSet:
    """One LoRA set of the demo."""

    label: str
    loras: tuple[tuple[str, float], ...] = ()
    """Name and scale."""
    prompt: str = "{}"
    """Template for the prompt."""


SETS = (
    DemoSet("none"),
    DemoSet("stripes", (("stripes", 1.0),)),
    DemoSet("outline", (("outline", 1.0),)),
    DemoSet("outline at 0.7", (("outline", 0.7),)),
    DemoSet("stripes + outline", (("stripes", 1.0), ("outline", 1.0))),
    DemoSet("hearty (trigger)", (("heart", 1.0),), "hearty"),
    DemoSet("dusk (trigger)", (("dusk", 1.0),), "{}, dusk"),
)
COLOURS = (("red", "blue"), ("yellow", "pink"), ("green", "white"), ("cyan", "orange"))
SHAPES = ("circle", "square", "triangle", "star")


@dataclass(slots=True)
class DemoJob:
    """One submitted job and what became of it."""

    demo_set: DemoSet
    body: dict[str, Any]
    id: str = ""
    view: dict[str, Any] = field(default_factory=dict)
    """Last answer of the API."""
    files: list[Path] = field(default_factory=list)

    @property
    def is_over(self) -> bool:
        """Whether its state is final."""
        return self.view.get("state") in {"succeeded", "failed", "cancelled"}


def demo_jobs(model: str) -> list[DemoJob]:
    """Make the demo's jobs in their shuffled order of arrival. Half name their LoRAs by tags, half by fields."""
    jobs = []
    for demo_set, (number, (fore, back)) in itertools.product(SETS, enumerate(COLOURS)):
        shape = "hearty" if demo_set.prompt == "hearty" else SHAPES[number]
        template = "{}" if demo_set.prompt == "hearty" else demo_set.prompt
        prompt = template.format(f"a {fore} {shape} on a {back} background")
        body: dict[str, Any] = {"model": model, "prompt": prompt, "seed": 1000 + number}
        if number % 2:
            body["loras"] = [{"name": name, "scale": scale} for name, scale in demo_set.loras]
        else:
            body["prompt"] += "".join(f" <lora:{name}:{scale:g}>" for name, scale in demo_set.loras)
        jobs.append(DemoJob(demo_set, body))
    random.Random(SHUFFLE_SEED).shuffle(jobs)  # noqa: S311 - an arrival order, not a secret
    return jobs


def run_demo(stack: Stack, model: str, out: Path, console: Console) -> Mapping[str, Any]:
    """Submit the demo's jobs to a running stack, wait for them, write pictures and report; return the report.

    Raises ``EngineFailed`` if a job does not succeed or the API does not answer.
    """
    jobs = demo_jobs(model)
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir(parents=True)
    started = time.monotonic()
    try:
        with httpx.Client(base_url=stack.api_url, timeout=10) as client:
            for job in jobs:
                job.id = client.post("/v1/jobs", json=job.body).raise_for_status().json()["id"]
            submit_s = time.monotonic() - started
            _watch(client, stack, jobs, console)
            total_s = time.monotonic() - started
            _download(client, jobs, out)
    except httpx.HTTPError as error:
        msg = f"the API did not answer as it should ({error}); see {stack.log('api')}"
        raise EngineFailed(msg) from error
    contact_sheet(_sheet_rows(jobs), out / "sheet.png")
    report = {**summarise(jobs), "workers": stack.workers, "submit_s": round(submit_s, 3), "total_s": round(total_s, 3)}
    (out / "report.json").write_text(json.dumps(report, indent=2) + "\n")
    _print_table(console, report)
    return report


def summarise(jobs: Sequence[DemoJob]) -> dict[str, Any]:
    """Count what grouping saved. A batch is what one worker claimed at once; its stages are counted once."""
    batches = {job.view["result"]["batch"]: job.view["result"] for job in jobs}
    stages: dict[str, float] = {}
    for batch in batches.values():
        for stage, seconds in batch["stage_s"].items():
            stages[stage] = round(stages.get(stage, 0.0) + seconds, 3)
    return {
        "jobs": len(jobs),
        "images": sum(len(job.view["images"]) for job in jobs),
        "batches": len(batches),
        "distinct_sets": len({job.demo_set.loras for job in jobs}),
        "fuses": sum(batch["fused"] for batch in batches.values()),
        "fuses_in_arrival_order": _switches(job.demo_set.loras for job in jobs),
        "cache_hits": sum(batch["cache_hits"] for batch in batches.values()),
        "cache_misses": sum(batch["cache_misses"] for batch in batches.values()),
        "stage_s": stages,
    }


def _switches(sets: Iterable[tuple[tuple[str, float], ...]]) -> int:
    """Count the rewrites that one worker makes which serves these sets in this order, from the plain model on."""
    return sum(before != after for before, after in itertools.pairwise(itertools.chain([()], sets)))


def _watch(client: httpx.Client, stack: Stack, jobs: Sequence[DemoJob], console: Console) -> None:
    """Show the jobs' progress until all are over. Raises ``EngineFailed`` if one did not succeed, and httpx' errors."""
    columns = (TextColumn("{task.description:<18}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    answered = time.monotonic()
    deadline = answered + DEMO_TIMEOUT_S
    with Progress(*columns, console=console) as progress:
        total = progress.add_task("all jobs", total=len(jobs))
        bars = {demo_set: progress.add_task(demo_set.label, total=0) for demo_set in SETS}
        for demo_set, bar in bars.items():
            progress.update(bar, total=sum(job.demo_set == demo_set for job in jobs))
        while not all(job.is_over for job in jobs):
            try:
                _look(client, jobs)
                answered = time.monotonic()
            except httpx.TransportError:
                if time.monotonic() > answered + PATIENCE_S:
                    raise
            progress.update(total, completed=sum(_done(job) for job in jobs))
            for demo_set, bar in bars.items():
                progress.update(bar, completed=sum(_done(job) for job in jobs if job.demo_set == demo_set))
            dead = stack.dead()
            if dead or time.monotonic() > deadline:
                what = f"{dead[0]} ended" if dead else f"not done after {DEMO_TIMEOUT_S:.0f} s"
                msg = f"{what}; see {stack.log(dead[0] if dead else 'worker-1')}"
                raise EngineFailed(msg)
            time.sleep(POLL_S)
    failed = [job for job in jobs if job.view["state"] != "succeeded"]
    if failed:
        msg = f"{len(failed)} jobs did not succeed; the first: {failed[0].view.get('error')}"
        raise EngineFailed(msg)


def _look(client: httpx.Client, jobs: Sequence[DemoJob]) -> None:
    for job in jobs:
        if not job.is_over:
            job.view = client.get(f"/v1/jobs/{job.id}").raise_for_status().json()


def _done(job: DemoJob) -> float:
    return 1.0 if job.is_over else float(job.view.get("progress") or 0.0)


def _download(client: httpx.Client, jobs: Sequence[DemoJob], out: Path) -> None:
    for number, job in enumerate(jobs):
        for image in job.view["images"]:
            label = "".join(mark if mark.isalnum() else "-" for mark in job.demo_set.label)
            path = out / f"{number:02d}-{label}-{image['index']}.png"
            path.write_bytes(client.get(image["url"]).raise_for_status().content)
            job.files.append(path)


def _sheet_rows(jobs: Sequence[DemoJob]) -> list[tuple[str, list[tuple[str, Path]]]]:
    rows = []
    for demo_set in SETS:
        own = sorted((job for job in jobs if job.demo_set == demo_set), key=lambda job: job.body["seed"])
        rows.append((demo_set.label, [(str(job.view["request"]["prompt"]), path) for job in own for path in job.files]))
    return rows


def _print_table(console: Console, report: Mapping[str, Any]) -> None:
    table = Table(title="the demo's jobs")
    table.add_column("what")
    table.add_column("figure", justify="right")
    for name in ("jobs", "images", "workers", "batches", "distinct_sets"):
        table.add_row(name.replace("_", " "), str(report[name]))
    table.add_row("fuses", f"{report['fuses']} (in arrival order {report['fuses_in_arrival_order']})")
    table.add_row("cache hits / misses", f"{report['cache_hits']} / {report['cache_misses']}")
    for stage, seconds in sorted(report["stage_s"].items(), key=lambda item: -item[1]):
        table.add_row(f"seconds: {stage}", f"{seconds:.2f}")
    table.add_row("seconds: all", f"{report['total_s']:.2f}")
    console.print(table)
