"""Dockerfile and docker-compose.yml, checked without a Docker engine.

What they name must exist: targets, modules, files, ports, settings. What is bad practice is refused, and each rule is
shown to refuse a bad sample.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from typing import Any

import pytest
import yaml

from core.settings import Settings
from core.telemetry.metrics import Metrics
from tests.conftest import ROOT
from tests.integration.deploy_rules import compose_faults, dockerfile_faults, environment, lineage, stages

DOCKERFILE = (ROOT / "Dockerfile").read_text()
GOOD = """\
FROM python:3.11-slim AS api
USER 10001
HEALTHCHECK CMD ["true"]
CMD ["python"]
"""


def test_the_dockerfile_has_no_fault() -> None:
    assert dockerfile_faults(DOCKERFILE, "api", "worker") == set()


def test_a_good_sample_has_no_fault() -> None:
    assert dockerfile_faults(GOOD, "api") == set()


@pytest.mark.parametrize(
    ("good", "bad", "fault"),
    [
        ("python:3.11-slim", "python", "no fixed tag"),
        ("python:3.11-slim", "python:latest", "no fixed tag"),
        ("python:3.11-slim", "python:${TAG}", "no fixed tag"),
        ("USER 10001\n", "", "runs as root"),
        ("USER 10001", "USER 10001\nUSER root", "runs as root"),
        ('HEALTHCHECK CMD ["true"]\n', "", "no health check"),
        ('CMD ["python"]', "CMD python -m api.main", "shell form"),
        ('CMD ["python"]', "ENTRYPOINT tini --", "shell form"),
        ('HEALTHCHECK CMD ["true"]', "HEALTHCHECK CMD true", "shell form"),
        ("USER", "ADD https://example.com/x /x\nUSER", "ADD in place of COPY"),
        ("USER", "RUN apt-get install --no-install-recommends x\nUSER", "apt lists in the layer"),
        (
            "USER",
            "RUN apt-get install x && rm -rf /var/lib/apt/lists/*\nUSER",
            "recommended packages",
        ),
        ("USER", "RUN pip install --constraint constraints.txt .\nUSER", "pip's cache in the layer"),
        ("USER", "RUN pip install --no-cache-dir .\nUSER", "unpinned packages"),
        ("USER", "RUN curl x | sh\nUSER", "runs what it downloads"),
        ("USER", "ENV AWS_SECRET_ACCESS_KEY=abc\nUSER", "a secret in the image"),
        ("USER", "COPY . /app\nUSER", "copies the whole folder"),
    ],
)
def test_a_bad_sample_is_refused(good: str, bad: str, fault: str) -> None:
    # Given the good sample with one thing wrong
    sample = GOOD.replace(good, bad, 1)
    assert sample != GOOD
    # Expect that fault and no other
    assert dockerfile_faults(sample, "api") == {fault}


@pytest.mark.parametrize(("target", "module"), [("api", "api.main"), ("worker", "worker.main")])
def test_an_image_starts_its_module_under_an_init_that_passes_signals_on(target: str, module: str) -> None:
    chain = lineage(stages(DOCKERFILE), target)
    assert json.loads(chain[0].last("CMD")) == ["python", "-m", module]
    assert [json.loads(stage.last("ENTRYPOINT") or "[]") for stage in chain][-1] == ["/usr/bin/tini", "--"]
    assert (ROOT / module.replace(".", "/")).with_suffix(".py").is_file()


def test_what_is_copied_exists_and_enters_the_build() -> None:
    allowed = {line[1:].rstrip("/") for line in (ROOT / ".dockerignore").read_text().splitlines() if line[:1] == "!"}
    copied = {
        source
        for stage in stages(DOCKERFILE).values()
        for text in stage.all("COPY")
        if "--from=" not in text
        for source in text.split()[:-1]
    }
    assert copied == allowed
    assert [source for source in sorted(copied) if not (ROOT / source).exists()] == []


def test_the_api_image_gets_no_torch() -> None:
    found = stages(DOCKERFILE)
    assert not [text for stage in lineage(found, "build-api") for text in stage.all("RUN") if "worker" in text]
    assert [text for text in found["api"].all("COPY") if "--from" in text] == ["--from=build-api /opt/venv /opt/venv"]
    assert "worker worker" not in found["api"].all("COPY")
    assert any('".[worker]"' in text for text in found["build-worker"].all("RUN"))


@pytest.mark.parametrize(("target", "port"), [("api", "api_port"), ("worker", "worker_metrics_port")])
def test_an_image_listens_where_the_settings_say(target: str, port: str) -> None:
    default = str(Settings.model_fields[port].default)
    found = stages(DOCKERFILE)
    assert found[target].last("EXPOSE") == default
    assert environment(found, target)[f"FUSELINE_{port.upper()}"] == default
    assert environment(found, target)[f"FUSELINE_{port.rpartition('_')[0].upper()}_HOST"] == "0.0.0.0"
    assert f"FUSELINE_{port.upper()}" in found[target].last("HEALTHCHECK")


@pytest.mark.parametrize(("target", "variable"), [("api", "API_PORT"), ("worker", "WORKER_METRICS_PORT")])
def test_a_health_check_passes_while_the_server_answers_and_fails_when_it_is_gone(target: str, variable: str) -> None:
    # Given a server that answers on a port of its own
    command = json.loads(stages(DOCKERFILE)[target].last("HEALTHCHECK").partition("CMD")[2])
    metrics = Metrics()
    environ = os.environ | {f"FUSELINE_{variable}": str(metrics.serve(0))}

    def check() -> int:
        return subprocess.run([sys.executable, *command[1:]], env=environ, check=False, capture_output=True).returncode

    # Expect the check to follow it
    assert command[0] == "python"
    assert check() == 0
    metrics.close()
    assert check() == 1


# --- docker-compose.yml -----------------------------------------------------------------------------------------

COMPOSE_TEXT = (ROOT / "docker-compose.yml").read_text()
COMPOSE: dict[str, Any] = yaml.safe_load(COMPOSE_TEXT)
SERVICES: dict[str, dict[str, Any]] = COMPOSE["services"]


def test_the_compose_file_has_no_fault() -> None:
    assert compose_faults(COMPOSE) == set()


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"comand": ["x"]}, "unknown key"),
        ({"image": None}, "neither image nor build, or both"),
        ({"build": {"context": "."}}, "neither image nor build, or both"),
        ({"image": "valkey/valkey"}, "no fixed tag"),
        ({"image": "valkey/valkey:latest"}, "no fixed tag"),
        ({"ports": ["6379:6379"]}, "a port that others can reach"),
        ({"environment": {"X": True}}, "an environment value that is no text"),
        ({"environment": {"DB_PASSWORD": "hunter2"}}, "a secret that is written down or has a default"),
        ({"environment": {"DB_PASSWORD": "${P:-hunter2}"}}, "a secret that is written down or has a default"),
        ({"depends_on": {"b": {"condition": "service_started"}}}, "depends on what is not there"),
        ({"depends_on": {"a": {"condition": "service_healthy"}}}, "waits for the health of what has no health check"),
        ({"volumes": ["./no/such/file:/x"]}, "mounts what is not there"),
        ({"volumes": ["unnamed:/x"]}, "mounts what is not there"),
    ],
)
def test_a_bad_compose_file_is_refused(change: dict[str, Any], fault: str) -> None:
    # Given a service without fault, and one thing changed
    good = {"image": "valkey/valkey:9.0.8"}
    assert compose_faults({"services": {"a": good}}) == set()
    service = {key: value for key, value in (good | change).items() if value is not None}
    # Expect that fault and no other
    assert compose_faults({"services": {"a": service}}) == {fault}


def test_the_service_is_whole() -> None:
    assert set(SERVICES) >= {"valkey", "s3", "api", "worker", "worker-gpu", "prometheus", "grafana"}
    assert SERVICES["worker"]["profiles"] == ["cpu"]
    assert SERVICES["worker-gpu"]["profiles"] == ["gpu"]
    (device,) = SERVICES["worker-gpu"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]


@pytest.mark.parametrize("name", ["api", "worker", "worker-gpu"])
def test_a_service_of_ours_is_built_from_a_stage_and_confined(name: str) -> None:
    service = SERVICES[name]
    assert service["build"]["target"] in stages(DOCKERFILE)
    assert set(service["build"].get("args", ())) <= set(re.findall(r"(?m)^ARG (\w+)", DOCKERFILE))
    assert service["read_only"] is True
    assert service["cap_drop"] == ["ALL"]
    assert set(service["depends_on"]) == {"valkey", "bucket"}


def test_what_runs_on_has_a_health_check() -> None:
    built = stages(DOCKERFILE)
    for name, service in SERVICES.items():
        if service["restart"] == "unless-stopped":
            assert "healthcheck" in service or built[service["build"]["target"]].last("HEALTHCHECK"), name


def test_valkey_loses_nothing_that_was_acknowledged() -> None:
    command = SERVICES["valkey"]["command"]
    flags = dict(zip(command[1::2], command[2::2], strict=True))
    assert flags["--appendonly"] == "yes"
    assert flags["--appendfsync"] == "always"
    assert flags["--maxmemory-policy"] == "noeviction"
    assert flags["--requirepass"].startswith("${VALKEY_PASSWORD:?")
    assert any(volume.endswith(":/data") for volume in SERVICES["valkey"]["volumes"])


def test_every_setting_that_is_named_exists() -> None:
    known = {f"FUSELINE_{name.upper()}" for name in Settings.model_fields}
    files = ("Dockerfile", "docker-compose.yml", ".env.example", "deploy/runbook.md")
    named = {name for file in files for name in re.findall(r"FUSELINE_[A-Z0-9_]+", (ROOT / file).read_text())}
    assert named
    assert named - known == set()


def test_the_environment_that_compose_gives_makes_valid_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for service in ("api", "worker", "worker-gpu"):
        for name, value in SERVICES[service]["environment"].items():
            monkeypatch.setenv(name, re.sub(r"\$\{\w+(?::-([^}]*)|:\?[^}]*)\}", lambda match: match[1] or "x", value))
        settings = Settings()
        assert settings.redis_url == "redis://:x@valkey:6379/0"
        assert settings.log_json
    assert settings.device == "cuda"


def test_the_example_environment_names_every_variable_and_holds_no_secret() -> None:
    example = (ROOT / ".env.example").read_text()
    lines = dict(re.findall(r"(?m)^#?([A-Z0-9_]+)=(.*)$", example))
    assert set(re.findall(r"\$\{(\w+)", COMPOSE_TEXT)) == set(lines)
    for name in re.findall(r"\$\{(\w+):\?", COMPOSE_TEXT):
        assert lines[name] == "", name


def test_docker_itself_accepts_the_compose_file() -> None:
    if not shutil.which("docker") or _docker("compose", "version").returncode:
        pytest.skip("no docker compose here; the rules above stand for it")
    done = _docker("compose", "--profile", "*", "--file", str(ROOT / "docker-compose.yml"), "config", "--quiet")
    assert done.returncode == 0, done.stderr


def _docker(*words: str) -> subprocess.CompletedProcess[str]:
    needed = dict.fromkeys(re.findall(r"\$\{(\w+):\?", COMPOSE_TEXT), "x")
    return subprocess.run(["docker", *words], env=os.environ | needed, check=False, capture_output=True, text=True)
