"""Every Python example of the README and the documentation runs; every link and file it names is there."""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

import pytest

from altsight.cli import COMMANDS
from altsight.core.config import from_dict
from altsight.methods import METHODS
from altsight.study.plan import Plan
from altsight.study.tasks import TaskFile

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def blocks(path: Path, language: str) -> str:
    """Return the code of a page in one language, joined."""
    return "\n".join(re.findall(rf"```{language}\n(.*?)```", path.read_text(), re.DOTALL))


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_examples_run(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    exec(compile(blocks(page, "python"), str(page), "exec"), {"__name__": "example"})


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert target.startswith("http") or (page.parent / target).exists(), target


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.stem)
def test_commands_and_plans_are_real(page: Path) -> None:
    for command in re.findall(r"^(?:\$ )?altsight (\w+)", blocks(page, "bash"), re.MULTILINE):
        assert command in COMMANDS
    if text := blocks(page, "toml"):
        table = tomllib.loads(text)
        if "methods" in table:
            assert from_dict(table, Plan, str(page)).methods
        else:
            assert from_dict(table, TaskFile, str(page)).tasks


def test_readme_names_every_method() -> None:
    text = (ROOT / "README.md").read_text()
    assert all(f"| `{name}` |" in text for name in METHODS)
