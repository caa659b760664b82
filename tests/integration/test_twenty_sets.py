"""The bundled model through twenty LoRA sets and back."""

from __future__ import annotations

import hashlib
import itertools
from pathlib import Path

import torch

from cli.bundle import SHAPES, lora_files, register_model
from core.catalogue.memory import MemoryCatalogue
from core.events import Event, Fused
from core.lora import LoraRef, LoraSet
from core.store.memory import MemoryStore
from worker.cache.files import FileCache
from worker.device import Device
from worker.engine.pipeline import DiffusersEngine


def test_a_cycle_of_twenty_sets_leaves_the_base_weights_equal_bit_for_bit(tmp_path: Path) -> None:
    store, catalogue = MemoryStore(), MemoryCatalogue()
    model = register_model(store, catalogue, SHAPES / "model", "shapes")
    refs = []
    for path in lora_files(SHAPES):
        store.put_file(f"public/{path.name}", path, "application/octet-stream")
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        refs.append(LoraRef(digest, name=path.stem, key=f"public/{path.name}", size_bytes=path.stat().st_size))
    events: list[Event] = []
    cache = FileCache(tmp_path, 2**30, store, events.append)
    device = Device(cache, lambda folder: DiffusersEngine(folder, device="cpu"), events.append)
    engine = device.hold(model, LoraSet(), {}, partial=False).engine
    before = {
        (component, name): weight.clone()
        for component, module in engine.components.items()
        for name, weight in module.state_dict().items()
    }
    sources = {ref.digest: [ref.key] for ref in refs}
    pairs = [
        LoraSet.of([LoraRef(a.digest, scale, scale, a.name, a.key, a.size_bytes), b])
        for scale, (a, b) in itertools.product((0.5, -0.7, 1.3, 0.9), itertools.combinations(refs, 2))
    ][:20]
    assert len({lora_set.id for lora_set in pairs}) == 20
    for lora_set in pairs:
        held = device.hold(model, lora_set, sources, partial=False)
        assert held.fused
        assert all(report.modules and not report.keys_unmatched for report in held.reports)
    assert any(
        not torch.equal(weight, before[component, name])
        for component, module in engine.components.items()
        for name, weight in module.state_dict().items()
    )
    device.hold(model, LoraSet(), {}, partial=False)
    for component, module in engine.components.items():
        for name, weight in module.state_dict().items():
            assert torch.equal(weight, before[component, name]), name
    assert sum(isinstance(event, Fused) for event in events) == 21
