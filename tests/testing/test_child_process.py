"""A child process of a test cannot hang the run, and leaves nothing behind."""

import os
import time
from pathlib import Path

import pytest

pytestmark = pytest.mark.time_limit(60)


def gone(pid: int) -> bool:
    """True when the process has ended, within two seconds; a zombie nobody reaped has ended too."""
    for _ in range(40):
        try:
            if Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z":
                return True
        except FileNotFoundError:
            return True
        time.sleep(0.05)
    return False


def test_a_child_gives_back_its_output_and_status(run_child) -> None:
    done = run_child("import sys; print('out'); print('err', file=sys.stderr); sys.exit(3)", check=False)
    assert (done.status, done.stdout, done.stderr) == (3, "out\n", "err\n")


def test_a_script_gets_its_arguments(run_child, tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text("import sys; print(sys.argv[1:])")
    assert run_child(script, "a", "b").stdout == "['a', 'b']\n"


def test_a_failed_child_fails_the_test(run_child) -> None:
    with pytest.raises(AssertionError, match="status 1"):
        run_child("raise SystemExit('why')")


def test_a_child_that_takes_too_long_is_killed_and_shows_where_it_stood(run_child) -> None:
    begin = time.monotonic()
    with pytest.raises(AssertionError, match=r"(?s)had not ended after 0.5 s.*line 2 in waits"):
        run_child("def waits():\n    __import__('time').sleep(60)\nwaits()", timeout=0.5)
    assert time.monotonic() - begin < 30


def test_what_a_child_started_dies_with_it(run_child) -> None:
    code = "import subprocess; print(subprocess.Popen(['sleep', '60']).pid)"
    assert gone(int(run_child(code).stdout))


def test_a_child_stays_in_the_session_of_the_run(run_child) -> None:
    assert int(run_child("import os; print(os.getsid(0))").stdout) == os.getsid(0)
