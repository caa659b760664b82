"""The ``fuseline`` command. It reads the settings and wires an embedded stack; nothing imports it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import httpx
import redis
import typer
from rich.console import Console

from cli.bundle import register_model
from cli.demo import run_demo
from cli.stack import Stack, interruptible
from core.catalogue.redis import RedisCatalogue
from core.errors import FuselineError
from core.store.open import open_store

app = typer.Typer(help="Fuseline: a job queue that makes images with diffusion models and LoRAs.", no_args_is_help=True)
console = Console()

EXAMPLES = Path(__file__).resolve().parent.parent / "examples" / "shapes"
MODEL = "shapes"

Workers = Annotated[int, typer.Option("--workers", "-w", min=1, help="Worker processes.", envvar="WORKERS")]


@app.command()
def demo(
    workers: Workers = 1,
    out: Annotated[Path, typer.Option(help="Where pictures and report go; emptied first.")] = Path("out"),
    directory: Annotated[Path, typer.Option("--dir", help="State of the stack; emptied first.")] = Path("var/demo"),
) -> None:
    """Run the main job on an embedded stack: jobs in, pictures out, and what grouping saved."""
    shutil.rmtree(directory, ignore_errors=True)
    with _stack(Stack(directory, workers)) as stack:
        run_demo(stack, MODEL, out, console)
    console.print(f"pictures: {out}/*.png   sheet: {out}/sheet.png   report: {out}/report.json")


@app.command()
def serve(
    workers: Workers = 1,
    port: Annotated[int, typer.Option(help="Port of the API; 0 = any free one.")] = 8000,
    directory: Annotated[Path, typer.Option("--dir", help="State of the stack; kept.")] = Path("var/serve"),
) -> None:
    """Run the embedded stack until Ctrl-C, and print its URLs."""
    with _stack(Stack(directory, workers, api_port=port)) as stack:
        console.print(
            f"API       {stack.api_url}/v1/jobs   docs {stack.api_url}/docs   metrics {stack.api_url}/metrics"
        )
        for number, metrics_port in enumerate(stack.worker_ports, 1):
            console.print(f"worker-{number}  metrics http://127.0.0.1:{metrics_port}/metrics")
        console.print(
            f"Valkey    {stack.valkey.url}\nstore     {stack.store_url}\nlogs      {stack.directory / 'logs'}"
        )
        console.print(f"model     {MODEL} with LoRAs {', '.join(path.stem for path in _loras())}")
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


@contextmanager
def _stack(stack: Stack) -> Iterator[Stack]:
    """Run a stack that knows the bundled model and LoRAs; stop it whatever happens."""
    try:
        with interruptible():
            try:
                console.print(f"starting Valkey, the API and {stack.workers} worker(s) in {stack.directory} …")
                stack.start_valkey()
                _register_bundle(stack)
                stack.start()
                _register_loras(stack)
                yield stack
            finally:
                stack.stop()
    except KeyboardInterrupt:
        console.print("\nstopped")
        raise typer.Exit(130) from None
    except FuselineError as error:
        console.print(f"[red]{error.code}: {error}")
        raise typer.Exit(1) from error


def _register_bundle(stack: Stack) -> None:
    store = open_store(stack.store_url)
    with redis.Redis.from_url(stack.valkey.url) as client:
        register_model(
            store,
            RedisCatalogue(client),
            EXAMPLES / "model",
            MODEL,
            steps=12,
            guidance=3.0,
            sampler="DPM++ 2M",
            width=64,
            height=64,
            size_multiple=8,
            max_pixels=256 * 256,
        )
    for path in _loras():
        store.put_file(f"public/loras/{path.name}", path, "application/octet-stream")


def _register_loras(stack: Stack) -> None:
    for path in _loras():
        body = {"name": path.stem, "key": f"public/loras/{path.name}"}
        httpx.post(f"{stack.api_url}/v1/loras", json=body, timeout=30).raise_for_status()


def _loras() -> list[Path]:
    return sorted((EXAMPLES / "loras").glob("*.safetensors"))


if __name__ == "__main__":
    sys.exit(app())
