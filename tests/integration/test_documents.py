"""Documents tell the truth about the code."""

import re

import pytest

from tests.conftest import ROOT

PACKAGES = ("core", "api", "worker", "cli")


def modules() -> list[str]:
    found = []
    for package in PACKAGES:
        found += [path.relative_to(ROOT).as_posix() for path in (ROOT / package).rglob("*.py")]
    return sorted(path for path in found if not path.endswith("__init__.py"))


ALIKE = {"api/routes", "worker/lora/adapters", "core/telemetry"}
"""Folders of many alike: one file per resource, type or part. Naming the folder is enough."""


@pytest.mark.parametrize("module", modules())
def test_the_architecture_names_every_module(module: str) -> None:
    text = (ROOT / "ARCHITECTURE.md").read_text()
    folder, _, name = module.rpartition("/")
    rows = [row for row in text.splitlines() if row.startswith(f"| `{folder}/")]
    named = any(f"`{module}`" in row or f"`{name}`" in row for row in rows)
    assert named or (folder in ALIKE and f"`{folder}/`" in text), f"give {module} its row in ARCHITECTURE.md"


@pytest.mark.parametrize("document", ["README.md", "ARCHITECTURE.md", "CONTRIBUTING.md", "docs/job-lifecycle.md"])
def test_every_path_that_a_document_names_exists(document: str) -> None:
    text = (ROOT / document).read_text()
    linked = re.findall(r"\]\(([^)#:]+)\)", text)
    named = re.findall(r"`((?:core|api|worker|cli|tests|docs|deploy|examples)/[\w./-]*\w/?)`", text)
    for path in {*linked, *named}:
        base = ROOT / document.rpartition("/")[0]
        assert (base / path).exists() or (ROOT / path).exists(), path


def test_the_readme_is_short_and_its_targets_exist() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 120
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"(?:^|`)make ([a-z][a-z-]*)", text, re.MULTILINE)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target


def test_the_readme_names_only_settings_that_exist() -> None:
    from core.settings import Settings

    for document in ("README.md", "docker-compose.yml", "deploy/runbook.md", "Dockerfile"):
        for name in set(re.findall(r"\bFUSELINE_([A-Z0-9_]+)", (ROOT / document).read_text())):
            assert name.lower() in Settings.model_fields, f"{document}: FUSELINE_{name}"
