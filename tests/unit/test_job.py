"""Job specifications and the table of states."""

import json
from dataclasses import replace

from core.job import TRANSITIONS, JobSpec, JobState
from core.lora import LoraRef, LoraSet

SPEC = JobSpec(
    model="shapes",
    model_digest="m" * 64,
    prompt="a réd circle 🔴",
    negative_prompt="",
    loras=LoraSet.of([LoraRef("a" * 64, unet=0.5, te=1.0, name="ink", key="public/ink", size_bytes=9)]),
    width=64,
    height=96,
    steps=12,
    guidance=3.5,
    sampler="Euler",
    seed=7,
    images=2,
    metadata={"order": "17"},
)


def test_a_spec_survives_its_json() -> None:
    assert JobSpec.from_json(SPEC.to_json()) == SPEC


def test_fields_of_a_later_release_are_ignored() -> None:
    later = {**json.loads(SPEC.to_json()), "colour_space": "P3"}
    later["loras"][0]["block_weights"] = [1]
    assert JobSpec.from_json(json.dumps(later)) == SPEC


def test_cost_counts_steps_pixels_and_images() -> None:
    assert SPEC.cost == 12 * 64 * 96 * 2


def test_the_group_is_the_model_with_its_loras_and_nothing_else() -> None:
    same = replace(SPEC, prompt="other", seed=8, steps=30, width=128)
    assert same.group == SPEC.group
    assert replace(SPEC, model_digest="n" * 64).group != SPEC.group
    assert replace(SPEC, loras=LoraSet()).group != SPEC.group


def test_terminal_states_lead_nowhere_and_all_others_lead_to_one() -> None:
    terminal = {state for state in JobState if state.is_terminal}
    assert terminal == {JobState.SUCCEEDED, JobState.FAILED, JobState.CANCELLED}
    assert set(TRANSITIONS) == set(JobState)
    for state in set(JobState) - terminal:
        reached: set[JobState] = {state}
        while (grown := reached | {after for before in reached for after in TRANSITIONS[before]}) != reached:
            reached = grown
        assert reached >= terminal
