"""Long proofs on LoRAs: many switches, flat memory, hostile files. ``make test-long``."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import pytest
import torch

from cli.bundle import SHAPES, lora_files
from core.errors import LoraError
from core.lora import LoraRef
from worker.engine.pipeline import DiffusersEngine
from worker.lora.file import read
from worker.lora.fuse import Fuser

SEED = 7
SWITCHES = 2_000
MUTANTS = 10_000


def resident_pages() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1])


@pytest.fixture(scope="module")
def engine() -> DiffusersEngine:
    return DiffusersEngine(SHAPES / "model", device="cpu")


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_thousands_of_switches_leave_the_base_weights_and_the_memory_as_they_were(engine: DiffusersEngine) -> None:
    fuser, draw = Fuser(engine.components), random.Random(SEED)
    before = {
        (component, name): weight.clone()
        for component, module in engine.components.items()
        for name, weight in module.state_dict().items()
    }
    settled = 0
    for number in range(SWITCHES):
        loras = []
        for path in draw.sample(lora_files(SHAPES), draw.randint(1, 3)):
            scale = round(draw.uniform(-1.5, 1.5), 3)
            ref = LoraRef(hashlib.sha256(path.read_bytes()).hexdigest(), scale, scale, path.stem)
            loras.append(read(path, ref, fuser.index))
        fuser.apply(loras)
        if number == SWITCHES // 10:
            settled = resident_pages()
    grown = resident_pages() / settled
    fuser.restore()
    for component, module in engine.components.items():
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, before[component, name]), name
    assert grown < 1.05
    print(
        f"covered: {SWITCHES} switches over 4 files, seed {SEED}; memory at the end {grown:.3f} of that after a tenth"
    )


@pytest.mark.long
@pytest.mark.timeout(1800)
def test_a_mutated_file_is_a_typed_error_or_a_sound_lora(engine: DiffusersEngine, tmp_path: Path) -> None:
    index, draw = Fuser(engine.components).index, random.Random(SEED)
    originals = [path.read_bytes() for path in lora_files(SHAPES)]
    outcomes: dict[str, int] = {}
    path = tmp_path / "mutant.safetensors"
    for _ in range(MUTANTS):
        path.write_bytes(mutate(draw, draw.choice(originals)))
        try:
            loaded = read(path, LoraRef("a" * 64, name="mutant"), index)
        except LoraError as error:
            outcomes[error.code] = outcomes.get(error.code, 0) + 1
        else:
            report = loaded.report
            assert report.keys_unmatched == 0
            assert report.modules > 0
            outcomes["loaded"] = outcomes.get("loaded", 0) + 1
    assert {"loaded", "lora_file_invalid", "lora_unmatched"} <= set(outcomes), outcomes
    print(f"covered: {MUTANTS} mutants, seed {SEED}: {outcomes}")


def mutate(draw: random.Random, original: bytes) -> bytes:
    """Cut, flip, overwrite, insert or double bytes; most often in the header, where they hurt."""
    data = bytearray(original)
    header = 8 + int.from_bytes(data[:8], "little")
    for _ in range(draw.randint(1, 4)):
        place = draw.randrange(min(header, len(data)) if draw.random() < 0.7 and data else max(len(data), 1))
        match draw.randrange(6):
            case 0:
                del data[place:]
            case 1 if place < len(data):
                data[place] ^= 1 << draw.randrange(8)
            case 2:
                data[place : place + 4] = draw.randbytes(4)
            case 3:
                data[place:place] = draw.choice([b'"', b"{", b"}", b"0", b"9" * 20, b"[", b"\x00", b'"F16"', b"-1"])
            case 4:
                del data[place : place + draw.randint(1, 64)]
            case _:
                data += data[place : place + 64]
    return bytes(data)
