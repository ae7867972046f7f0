"""The names of the Python interface lead to its functions, whatever was imported before."""

from __future__ import annotations

import subprocess
import sys

import pytest


@pytest.mark.parametrize("before", ["", "import altsight.transfer.base", "import altsight.study.plan, altsight.api"])
def test_folders_do_not_hide_functions(before: str) -> None:
    code = f"import altsight\n{before}\nfor _ in range(2): print(altsight.study.__module__, altsight.transfer.__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.splitlines() == ["altsight.api transfer"] * 2, done.stderr[-500:]
