"""`make demo`, as a user runs it, and what it leaves."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tests.conftest import ROOT


def demo(tmp_path: Path, workers: int) -> subprocess.Popen[bytes]:
    command = [sys.executable, "-m", "cli.main", "demo", "--workers", str(workers)]
    folders = ["--out", str(tmp_path / "out"), "--dir", str(tmp_path / "state")]
    return subprocess.Popen(
        [*command, *folders], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, start_new_session=True
    )


def left_behind(directory: Path) -> dict[int, str]:
    """Other processes whose arguments, environment or working folder name it: their command lines by id."""
    found = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            command, environment = (process / "cmdline").read_bytes(), (process / "environ").read_bytes()
            folder = os.fsencode((process / "cwd").readlink())
        except (FileNotFoundError, PermissionError, ProcessLookupError):
            continue
        if str(directory).encode() in command + environment + folder and int(process.name) != os.getpid():
            found[int(process.name)] = command.replace(b"\0", b" ").decode()
    return found


@pytest.mark.timeout(300)
@pytest.mark.parametrize("workers", [1, 2])
def test_the_demo_draws_everything_and_fuses_seldom(tmp_path: Path, workers: int) -> None:
    process = demo(tmp_path, workers)
    output, _ = process.communicate(timeout=280)
    assert process.returncode == 0, output.decode()
    report = json.loads((tmp_path / "out" / "report.json").read_text())
    assert report["workers"] == workers
    assert report["jobs"] >= 24
    assert report["images"] >= 24
    assert report["distinct_sets"] >= 5
    assert 0 < report["fuses"] <= report["distinct_sets"] + workers
    assert report["fuses"] * 2 <= report["fuses_in_arrival_order"]
    assert report["cache_hits"] > 0
    assert report["cache_misses"] >= 4
    pictures = sorted((tmp_path / "out").glob("[0-9]*.png"))
    assert len(pictures) == report["images"]
    for path in pictures:
        with Image.open(path) as image:
            assert image.size == (64, 64)
            assert len(np.unique(np.asarray(image.convert("RGB")).reshape(-1, 3), axis=0)) > 50
            assert "Steps: 12" in image.info["parameters"]
    with Image.open(tmp_path / "out" / "sheet.png") as sheet:
        assert sheet.width > 400
    assert left_behind(tmp_path) == {}


def test_ctrl_c_stops_everything(tmp_path: Path) -> None:
    process = demo(tmp_path, 1)
    stored = tmp_path / "state" / "store" / "tenants"
    deadline = time.monotonic() + 100
    while not stored.exists():
        assert time.monotonic() < deadline
        assert process.poll() is None
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 130, output.decode()
    assert b"stopped" in output
    assert left_behind(tmp_path) == {}
