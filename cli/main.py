"""The ``fuseline`` command. It reads the settings and wires an embedded stack; nothing imports it."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import redis
import typer
from rich.console import Console

from cli.bundle import MODEL, SHAPES, lora_files, register_model, running
from cli.demo import run_demo
from cli.stack import Stack, interruptible
from core.catalogue.redis import RedisCatalogue
from core.errors import FuselineError
from core.samplers import SAMPLERS
from core.settings import Settings
from core.store.open import open_store

app = typer.Typer(help="Fuseline: a job queue that makes images with diffusion models and LoRAs.", no_args_is_help=True)
console = Console()

Bundle = Annotated[Path, typer.Option(help="Folder with model/ (diffusers layout) and loras/.")]
Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Worker processes.", envvar="WORKERS")]


@app.command()
def demo(
    workers: Workers = 1,
    out: Annotated[Path, typer.Option(help="Where pictures and report go; emptied first.")] = Path("out"),
    directory: Annotated[Path, typer.Option("--dir", help="State of the stack; emptied first.")] = Path("var/demo"),
    bundle: Bundle = SHAPES,
) -> None:
    """Run the main job on an embedded stack: jobs in, pictures out, and what grouping saved."""
    with _stack(Stack(directory, workers, fresh=True), bundle) as stack:
        run_demo(stack, MODEL, out, console)
    console.print(f"pictures: {out}/*.png   sheet: {out}/sheet.png   report: {out}/report.json")


@app.command()
def serve(
    workers: Workers = 1,
    port: Annotated[int, typer.Option(help="Port of the API; 0 = any free one.")] = 8000,
    directory: Annotated[Path, typer.Option("--dir", help="State of the stack; kept.")] = Path("var/serve"),
    bundle: Bundle = SHAPES,
) -> None:
    """Run the embedded stack until Ctrl-C, and print its URLs."""
    with _stack(Stack(directory, workers, api_port=port), bundle) as stack:
        console.print(
            f"API       {stack.api_url}/v1/jobs   docs {stack.api_url}/docs   metrics {stack.api_url}/metrics"
        )
        for number, metrics_port in enumerate(stack.worker_ports, 1):
            console.print(f"worker-{number}  metrics http://127.0.0.1:{metrics_port}/metrics")
        console.print(
            f"Valkey    {stack.valkey.url}\nstore     {stack.store_url}\nlogs      {stack.directory / 'logs'}"
        )
        console.print(f"model     {MODEL} with LoRAs {', '.join(path.stem for path in lora_files(bundle))}")
        console.print(
            f"try       curl -s {stack.api_url}/v1/jobs -H 'content-type: application/json' "
            f"""-d '{{"model": "{MODEL}", "prompt": "a red circle on a blue background <lora:stripes:1>"}}'""",
            soft_wrap=True,
        )
        console.print("Ctrl-C stops everything.")
        while not stack.dead():
            time.sleep(0.5)
        name = stack.dead()[0]
        console.print(f"[red]{name} ended by itself; see {stack.log(name)}")
        raise typer.Exit(1)


@app.command("add-model")
def add_model(
    folder: Annotated[Path, typer.Argument(help="Checkpoint in diffusers layout.", exists=True, file_okay=False)],
    name: Annotated[str, typer.Argument(help="Name that jobs will use; an older model of that name is replaced.")],
    steps: Annotated[int, typer.Option(help="Default steps.")] = 20,
    guidance: Annotated[float, typer.Option(help="Default guidance scale.")] = 7.0,
    sampler: Annotated[str, typer.Option(help="Default sampler.")] = "DPM++ 2M",
    size: Annotated[int, typer.Option(help="Default width and height, in pixels.")] = 512,
    pool: Annotated[str, typer.Option(help="Pool whose workers serve it.")] = "default",
) -> None:
    """Upload a model to the store of this deployment and enter it into the catalogue."""
    if sampler not in SAMPLERS:
        console.print(f"[red]unknown sampler {sampler!r}; known are {', '.join(SAMPLERS)}")
        raise typer.Exit(2)
    settings = Settings()
    store = open_store(
        settings.store_url, s3_endpoint=settings.s3_endpoint, s3_region=settings.s3_region, public_url=""
    )
    defaults = {"steps": steps, "guidance": guidance, "sampler": sampler, "width": size, "height": size, "pool": pool}
    try:
        with redis.Redis.from_url(settings.redis_url) as client:
            record = register_model(store, RedisCatalogue(client), folder, name, **defaults)
    except FuselineError as error:
        _complain(error)
        raise typer.Exit(1) from error
    console.print(f"{name}: {len(record.files)} files, digest {record.digest[:12]}, pool {pool}")


@contextmanager
def _stack(stack: Stack, bundle: Path) -> Iterator[Stack]:
    """Run a stack that knows the bundle's model and LoRAs; stop it whatever happens."""
    try:
        with interruptible():
            console.print(f"starting Valkey, the API and {stack.workers} worker(s) in {stack.directory} …")
            with running(stack, bundle):
                yield stack
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None
    except FuselineError as error:
        _complain(error)
        raise typer.Exit(1) from error


def _complain(error: FuselineError) -> None:
    console.print(f"{error.code}: {error}", style="red", markup=False, highlight=False, soft_wrap=True)


if __name__ == "__main__":
    sys.exit(app())
