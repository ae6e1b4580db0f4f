"""The doctor draws the right conclusion from whatever a machine answers."""

from __future__ import annotations

import errno
from collections.abc import Callable
from pathlib import Path

import pytest

from userfault import abi
from userfault.doctor import Finding, usable
from userfault.doctor.huge_pages import TmpfsAttempt, huge_page_findings
from userfault.doctor.kernel import kernel_findings, parse_release
from userfault.doctor.machine import Machine
from userfault.doctor.memory_limits import cgroup_limit, memory_findings
from userfault.doctor.report import as_text
from userfault.doctor.userfaultfd import Attempt, Way, userfaultfd_findings

ALL = sum(value for name, value in vars(abi).items() if name.startswith("UFFD_FEATURE_"))
PTRACE = f"{1 << 19:016x}"

MakeMachine = Callable[[dict[str, str]], Machine]


@pytest.fixture
def machine(tmp_path: Path) -> MakeMachine:
    """Makes a folder that looks like a machine with the given files."""

    def make(files: dict[str, str]) -> Machine:
        for name, text in files.items():
            path = tmp_path / name.lstrip("/")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n")
        return Machine(tmp_path)

    return make


def status(capabilities: str = "0", seccomp: str = "0") -> dict[str, str]:
    return {"/proc/self/status": f"Name:\tx\nCapEff:\t{capabilities}\nNoNewPrivs:\t0\nSeccomp:\t{seccomp}\n"}


def attempts(call: int, device: int, user: int, features: int = ALL) -> dict[Way, Attempt]:
    def attempt(number: int) -> Attempt:
        return Attempt(number, 0 if number else features)

    return {"system call": attempt(call), "device": attempt(device), "user-mode-only": attempt(user)}


def named(findings: list[Finding], name: str) -> Finding:
    return next(finding for finding in findings if finding.name == name)


def test_a_privileged_process_on_a_new_kernel_has_everything(machine: MakeMachine) -> None:
    findings = userfaultfd_findings(machine(status(PTRACE)), attempts(0, 0, 0), 0)
    assert {finding.state for finding in findings} <= {"yes", "fact", "unknown"}
    assert usable(findings + kernel_findings(machine({}), "6.18.0", "x86_64"))


def test_an_unprivileged_process_is_told_to_open_the_device_before_any_sysctl(machine: MakeMachine) -> None:
    files = {"/proc/sys/vm/unprivileged_userfaultfd": "0", **status()}
    findings = userfaultfd_findings(machine(files), attempts(errno.EPERM, errno.EACCES, 0), 0)
    finding = named(findings, "system call, all faults")
    assert finding.state == "no"
    assert "CAP_SYS_PTRACE" in finding.why
    places = [
        next(i for i, line in enumerate(finding.mend) if word in line) for word in ("--device", "sysctl")
    ]
    assert places == sorted(places)
    assert named(findings, "system calls on absent memory").state == "no"
    assert "pin()" in named(findings, "system calls on absent memory").why


def test_a_call_that_nothing_in_the_kernel_forbids_was_filtered(machine: MakeMachine) -> None:
    files = {"/proc/sys/vm/unprivileged_userfaultfd": "1", **status(seccomp="2")}
    findings = userfaultfd_findings(machine(files), attempts(errno.EPERM, errno.ENOENT, errno.EPERM), 0)
    for name in ("system call, all faults", "system call, faults of the program alone"):
        assert "seccomp" in named(findings, name).why
        assert "--device /dev/userfaultfd" in named(findings, name).mend[0]
    assert not usable(findings)


def test_a_container_without_the_device_is_told_how_to_get_it(machine: MakeMachine) -> None:
    inside = machine({"/.dockerenv": "", **status()})
    finding = named(
        userfaultfd_findings(inside, attempts(errno.EPERM, errno.ENOENT, 0), 0),
        "/dev/userfaultfd, all faults",
    )
    assert finding.mend == ("docker run --device /dev/userfaultfd ...   (or podman; for a container)",)


def test_a_kernel_without_userfaultfd_is_named(machine: MakeMachine) -> None:
    answers = attempts(errno.ENOSYS, errno.ENOENT, errno.ENOSYS)
    finding = named(userfaultfd_findings(machine({}), answers, errno.ENOTTY), "system call, all faults")
    assert "CONFIG_USERFAULTFD" in finding.why


def test_what_an_older_kernel_lacks_is_named_with_the_version_that_has_it(machine: MakeMachine) -> None:
    features = ALL & ~(abi.UFFD_FEATURE_POISON | abi.UFFD_FEATURE_WP_ASYNC | abi.UFFD_FEATURE_MOVE)
    findings = userfaultfd_findings(machine({}), attempts(0, 0, 0, features), errno.ENOTTY)
    assert {f.name for f in findings if f.state == "partly"} == {
        "poison", "tracking writes without faults", "moving pages", "PAGEMAP_SCAN",
    }  # fmt: skip
    assert "6.7" in named(findings, "tracking writes without faults").why
    assert usable(findings + kernel_findings(machine({}), "6.1.0-18-amd64", "x86_64"))


@pytest.mark.parametrize(
    ("release", "state"), [("5.15.0-91-generic", "no"), ("5.19.0", "yes"), ("odd", "unknown")]
)
def test_the_version_decides(machine: MakeMachine, release: str, state: str) -> None:
    assert named(kernel_findings(machine({}), release, "x86_64"), "version").state == state


def test_a_release_begins_with_two_numbers() -> None:
    assert parse_release("6.1.0-18-amd64") == (6, 1)
    assert parse_release("generic") is None


def test_hugetlb_pages_that_are_promised_are_not_to_be_had(machine: MakeMachine) -> None:
    folder = "/sys/kernel/mm/hugepages/hugepages-2048kB"
    files = {f"{folder}/nr_hugepages": "8", f"{folder}/free_hugepages": "5", f"{folder}/resv_hugepages": "5"}
    findings = huge_page_findings(machine(files), TmpfsAttempt(""))
    pool = named(findings, "hugetlb pool of 2 MiB pages")
    assert pool.state == "no"
    assert "vm.nr_hugepages" in pool.mend[0]
    (machine(files).root / f"{folder[1:]}/resv_hugepages").write_text("2")
    assert named(huge_page_findings(machine({}), TmpfsAttempt("")), pool.name).state == "yes"


@pytest.mark.parametrize(
    ("file", "value", "word"),
    [
        ("/proc/sys/user/max_user_namespaces", "0", "max_user_namespaces=16384"),
        ("/proc/sys/kernel/unprivileged_userns_clone", "0", "unprivileged_userns_clone=1"),
        ("/proc/sys/kernel/apparmor_restrict_unprivileged_userns", "1", "apparmor"),
    ],
)
def test_whoever_forbids_user_namespaces_is_named_with_the_mend(
    machine: MakeMachine, file: str, value: str, word: str
) -> None:
    finding = named(
        huge_page_findings(machine({file: value}), TmpfsAttempt("unshare", errno.EPERM)), "huge tmpfs"
    )
    assert finding.state == "no"
    assert word in finding.mend[0]


def test_an_attempt_that_could_not_be_made_says_nothing_about_the_machine(machine: MakeMachine) -> None:
    attempt = TmpfsAttempt("the attempt took too long", errno.ETIMEDOUT)
    assert named(huge_page_findings(machine({}), attempt), "huge tmpfs").state == "unknown"


@pytest.mark.parametrize(
    ("files", "limit"),
    [
        ({"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/b/memory.max": "max"}, None),
        ({"/proc/self/cgroup": "0::/a/b", "/sys/fs/cgroup/a/b/memory.max": "1048576"}, 1048576),
        (
            {
                "/proc/self/cgroup": "0::/a/b",
                "/sys/fs/cgroup/a/b/memory.max": "4096000",
                "/sys/fs/cgroup/a/memory.max": "2048000",
            },
            2048000,
        ),
        (
            {
                "/proc/self/cgroup": "4:cpu,memory:/x\n0::/",
                "/sys/fs/cgroup/memory/x/memory.limit_in_bytes": "9223372036854771712",
                "/sys/fs/cgroup/memory/memory.limit_in_bytes": "536870912",
            },
            536870912,
        ),
        ({"/proc/self/cgroup": "0::/outside", "/sys/fs/cgroup/memory.max": "777777"}, 777777),
        ({}, None),
    ],
)
def test_the_tightest_limit_of_all_control_groups_counts(
    machine: MakeMachine, files: dict[str, str], limit: int | None
) -> None:
    found = cgroup_limit(machine(files))
    assert (found and found[0]) == limit


def test_few_mappings_are_a_finding(machine: MakeMachine) -> None:
    finding = named(memory_findings(machine({"/proc/sys/vm/max_map_count": "1000"})), "vm.max_map_count")
    assert finding.state == "partly"
    assert finding.mend == ("sudo sysctl -w vm.max_map_count=65530",)


def test_a_machine_that_says_nothing_breaks_nothing(machine: MakeMachine) -> None:
    bare = machine({})
    findings = [
        *kernel_findings(bare, "6.18.0", "x86_64"),
        *userfaultfd_findings(bare, attempts(errno.ENOSYS, errno.ENOENT, errno.ENOSYS), errno.ENOENT),
        *huge_page_findings(bare, TmpfsAttempt("unshare", errno.EPERM)),
        *memory_findings(bare),
    ]
    assert "does not work here" in as_text(findings)
    assert all(finding.why for finding in findings if finding.state in ("no", "partly"))
