"""A test that hangs ends the run and shows where it stood, even while it holds the interpreter lock."""

from pathlib import Path

import pytest

HANGS = """
import ctypes
import pytest

@pytest.mark.time_limit(1)
def test_that_holds_the_lock_for_ever():
    ctypes.PyDLL(None).pause()
"""


@pytest.mark.time_limit(60)
def test_a_test_that_holds_the_interpreter_lock_for_ever_is_ended(run_child, tmp_path: Path) -> None:
    test = tmp_path / "test_hangs.py"
    test.write_text(HANGS)
    code = "import sys, pytest; pytest.main([sys.argv[1], '-p', 'conftest', '-p', 'no:cacheprovider'])"
    here = str(Path(__file__).parent.parent)
    done = run_child(code, str(test), env={"PYTHONPATH": here}, timeout=30, check=False)
    assert done.status == 1
    assert "test_that_holds_the_lock_for_ever" in done.stderr
    assert done.seconds < 20
