"""With LLAMAC_REQUIRE_ALL=1 a missing program fails a test, missing data still skips it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

TESTS = """
import pytest

@pytest.mark.needs("a-program-that-nobody-has")
def test_needs_a_program(): pass

@pytest.mark.needs("sh")
def test_needs_what_is_there(): pass

def test_skips_by_itself(): pytest.skip("no emulator")

def test_needs_data(): pytest.skip("shared data: none here")

@pytest.mark.skipif(True, reason="this CPU lacks amx")
def test_needs_a_cpu(): pass

@pytest.mark.xfail(reason="known", strict=True)
def test_fails_as_known(): assert False
"""
MODULE = "import pytest\npytest.importorskip('a_module_that_nobody_has')\n"


@pytest.mark.parametrize(
    ("require_all", "expected"),
    [
        ("0", {"passed": 1, "skipped": 5, "xfailed": 1}),
        ("1", {"passed": 1, "skipped": 2, "xfailed": 1, "failed": 1, "errors": 2}),
    ],
)
def test_skips_become_failures(require_all: str, expected: dict[str, int], tmp_path: Path) -> None:
    """Programs, emulators and modules can be installed; published data and CPUs cannot."""
    shutil.copy(Path(__file__).with_name("conftest.py"), tmp_path)
    (tmp_path / "pytest.ini").write_text("[pytest]\nmarkers =\n  needs: programs\n")
    (tmp_path / "test_one.py").write_text(TESTS)
    (tmp_path / "test_module.py").write_text(MODULE)
    command = [sys.executable, "-m", "pytest", "-q", "--continue-on-collection-errors"]
    environment = dict(os.environ) | {"LLAMAC_REQUIRE_ALL": require_all}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    counts = re.findall(r"(\d+) (\w+)", done.stdout.splitlines()[-1])
    assert {word: int(count) for count, word in counts if word != "in"} == expected, done.stdout
