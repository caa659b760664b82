"""Rules for Dockerfiles and compose files, in the manner of hadolint: each is a name and what breaks it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tests.conftest import ROOT

SECRET_NAME = re.compile(r"PASSWORD|SECRET|TOKEN|ACCESS_KEY|AUTH|MC_HOST|REDIS_URL")
SERVICE_KEYS = frozenset(
    (
        *("build", "command", "environment", "image", "profiles", "restart", "stop_grace_period"),
        *("cap_drop", "read_only", "security_opt", "tmpfs", "deploy"),
        *("depends_on", "healthcheck", "networks", "ports", "volumes"),
    )
)
"""The keys of the compose specification that this project uses; anything else is likely a slip."""


# --- Dockerfiles ------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Instruction:
    word: str
    rest: str


@dataclass(frozen=True)
class Stage:
    name: str
    base: str
    body: tuple[Instruction, ...]

    def last(self, word: str) -> str:
        return next((item.rest for item in reversed(self.body) if item.word == word), "")

    def all(self, word: str) -> list[str]:
        return [item.rest for item in self.body if item.word == word]


def stages(text: str) -> dict[str, Stage]:
    """Read a Dockerfile: its stages by name, each with its own instructions."""
    joined = re.sub(r"\\\n", " ", re.sub(r"(?m)^\s*#.*\n", "", text))
    found: dict[str, Stage] = {}
    for line in filter(None, map(str.strip, joined.splitlines())):
        word, _, rest = line.partition(" ")
        if word == "FROM":
            base, _, name = rest.partition(" AS ")
            found[name or base] = Stage(name or base, base, ())
        elif found:
            stage = list(found.values())[-1]
            found[stage.name] = Stage(stage.name, stage.base, (*stage.body, Instruction(word, rest.strip())))
    return found


def lineage(found: Mapping[str, Stage], name: str) -> list[Stage]:
    """List a stage and those that it builds on, the nearest first."""
    chain = [found[name]]
    while chain[-1].base in found:
        chain.append(found[chain[-1].base])
    return chain


def environment(found: Mapping[str, Stage], name: str) -> dict[str, str]:
    """Give the variables that an image sets."""
    texts = [text for stage in reversed(lineage(found, name)) for text in stage.all("ENV")]
    return {key: value.strip('"') for text in texts for key, value in re.findall(r'(\w+)=("[^"]*"|\S+)', text)}


INSTRUCTION_RULES: tuple[tuple[str, str, Callable[[str], object]], ...] = (
    ("ADD in place of COPY", "ADD", bool),
    ("shell form", "CMD", lambda rest: not _is_exec_form(rest)),
    ("shell form", "ENTRYPOINT", lambda rest: not _is_exec_form(rest)),
    ("shell form", "HEALTHCHECK", lambda rest: not _is_exec_form(rest.partition("CMD")[2])),
    ("apt lists in the layer", "RUN", lambda rest: "apt-get" in rest and "rm -rf /var/lib/apt/lists/*" not in rest),
    ("recommended packages", "RUN", lambda rest: "apt-get" in rest and "--no-install-recommends" not in rest),
    ("pip's cache in the layer", "RUN", lambda rest: "pip install" in rest and "--no-cache-dir" not in rest),
    ("unpinned packages", "RUN", lambda rest: "pip install" in rest and "--constraint constraints.txt" not in rest),
    ("runs what it downloads", "RUN", lambda rest: re.search(r"(curl|wget)[^|]*\|\s*(ba)?sh", rest)),
    ("a secret in the image", "ENV", lambda rest: re.search(rf"({SECRET_NAME.pattern})\w*=[^\s\"]", rest)),
    ("a secret in the image", "ARG", SECRET_NAME.search),
    ("copies the whole folder", "COPY", lambda rest: re.match(r"(--\S+ )*\. ", rest)),
)
"""Fault, the instruction's word, and what breaks the rule."""


def dockerfile_faults(text: str, *targets: str) -> set[str]:
    """Name what is wrong with a Dockerfile, and with the images that its targets make."""
    found = stages(text)
    faults = {
        fault
        for stage in found.values()
        for item in stage.body
        for fault, word, breaks in INSTRUCTION_RULES
        if item.word == word and breaks(item.rest)
    }
    defaults = dict(re.findall(r"(?m)^ARG (\w+)=(\S+)", text.partition("FROM")[0]))
    for stage in found.values():
        base = re.sub(r"\$\{(\w+)\}", lambda match: defaults.get(match[1], ""), stage.base)
        if base not in found and not _has_fixed_tag(base):
            faults.add("no fixed tag")
    for target in targets:
        chain = lineage(found, target)
        if next(filter(None, (stage.last("USER") for stage in chain)), "root").split(":")[0] in {"root", "0"}:
            faults.add("runs as root")
        if not any(stage.last("HEALTHCHECK") for stage in chain):
            faults.add("no health check")
    return faults


def _is_exec_form(text: str) -> bool:
    try:
        parsed = json.loads(text)
    except ValueError:
        return False
    return isinstance(parsed, list) and all(isinstance(word, str) for word in parsed)


def _has_fixed_tag(image: str) -> bool:
    tag = image.rpartition("/")[2].partition(":")[2]
    return tag not in {"", "latest"}


# --- compose files ----------------------------------------------------------------------------------------------


def compose_faults(compose: Mapping[str, Any]) -> set[str]:
    """Name what the compose specification, or this project, does not allow."""
    services = compose["services"]
    volumes = set(compose.get("volumes") or ())
    return {fault for service in services.values() for fault in _service_faults(service, services, volumes)}


def _service_faults(service: Mapping[str, Any], services: Mapping[str, Any], volumes: set[str]) -> Iterator[str]:
    if set(service) - SERVICE_KEYS:
        yield "unknown key"
    if ("image" in service) == ("build" in service):
        yield "neither image nor build, or both"
    if "image" in service and not _has_fixed_tag(service["image"]):
        yield "no fixed tag"
    if not all(re.fullmatch(r"127\.0\.0\.1:\d+:\d+", port) for port in service.get("ports", ())):
        yield "a port that others can reach"
    yield from _environment_faults(service.get("environment", {}))
    for other, how in service.get("depends_on", {}).items():
        if other not in services:
            yield "depends on what is not there"
        elif how["condition"] == "service_healthy" and "healthcheck" not in services[other]:
            yield "waits for the health of what has no health check"
    for source in (volume.partition(":")[0] for volume in service.get("volumes", ())):
        if source not in volumes and not (source.startswith("./") and (ROOT / source).exists()):
            yield "mounts what is not there"


def _environment_faults(values: Mapping[str, Any]) -> Iterator[str]:
    for name, value in values.items():
        if not isinstance(value, str):
            yield "an environment value that is no text"
        elif SECRET_NAME.search(name) and not re.search(r"\$\{\w+:\?", value):
            yield "a secret that is written down or has a default"
