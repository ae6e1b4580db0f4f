"""`userfault doctor` on the machine that runs the tests."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from typer.testing import CliRunner

from userfault import abi
from userfault.__main__ import app
from userfault.doctor import examine, usable
from userfault.doctor.userfaultfd import attempt_all


def test_the_page_names_every_finding_and_the_exit_status_says_whether_it_works() -> None:
    done = CliRunner().invoke(app, ["doctor"])
    findings = examine()
    assert done.exit_code == (0 if usable(findings) else 1)
    for finding in findings:
        assert finding.name in done.stdout


def test_json_holds_the_same_findings() -> None:
    done = CliRunner().invoke(app, ["doctor", "--json"])
    answer = json.loads(done.stdout)
    assert [f["name"] for f in answer["findings"]] == [f.name for f in examine()]
    assert {f["state"] for f in answer["findings"]} <= {"yes", "partly", "no", "unknown", "fact"}
    assert all(isinstance(f["mend"], list) for f in answer["findings"])


def test_python_m_and_the_script_are_one_program() -> None:
    script = Path(sys.executable).with_name("userfault")
    commands = [[sys.executable, "-m", "userfault"], *([[str(script)]] if script.exists() else [])]
    for command in commands:
        done = subprocess.run([*command, "--help"], capture_output=True, text=True, check=True)
        assert "doctor" in done.stdout


def test_the_attempts_leave_no_descriptor_behind() -> None:
    before = os.listdir("/proc/self/fd")
    attempts = attempt_all()
    assert os.listdir("/proc/self/fd") == before
    for attempt in attempts.values():
        assert (attempt.errno == 0) == bool(attempt.features & abi.UFFD_FEATURE_MISSING_SHMEM)


def test_the_huge_tmpfs_leaves_no_mount_and_no_folder_behind(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    mounts = Path("/proc/self/mounts").read_text()
    examine()
    assert Path("/proc/self/mounts").read_text() == mounts
    assert list(tmp_path.iterdir()) == []
