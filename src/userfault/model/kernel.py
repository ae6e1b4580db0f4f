"""The machine: what all processes share, and which kernel it runs."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING

from userfault.model.content import ZERO
from userfault.model.defects import defect_names
from userfault.model.layout import HUGE_PAGE
from userfault.model.page import Page
from userfault.model.pagecache import File, HugetlbPool
from userfault.model.process import Process
from userfault.model.versions import parse_version

if TYPE_CHECKING:
    from userfault.model.mm import AddressSpace
    from userfault.model.thread import Thread
    from userfault.model.vma import Vma


class Kernel:
    """A kernel without processes.

    version         the profile: "5.17", "6.1", "6.12" or "6.18"; other versions from 5.7 on behave as the
                    rules date themselves
    defects         names of `userfault.model.defects`, with hyphens or underscores
    hugetlb_pages   free 2 MiB pages in the pool
    swap            MADV_PAGEOUT has somewhere to write to
    unprivileged_userfaultfd   the sysctl vm.unprivileged_userfaultfd
    memory_failure  CONFIG_MEMORY_FAILURE: poison raises BUS_MCEERR_AR, else BUS_ADRERR. None: as measured
    """

    def __init__(
        self,
        version: str = "6.18",
        *,
        defects: Iterable[str] = (),
        hugetlb_pages: int = 1024,
        swap: bool = True,
        unprivileged_userfaultfd: bool = False,
        memory_failure: bool | None = None,
    ) -> None:
        self.version = parse_version(version)
        self.defects = defect_names(defects)
        self.hugetlb = HugetlbPool(hugetlb_pages)
        self.swap = swap
        self.unprivileged_userfaultfd = unprivileged_userfaultfd
        self.memory_failure = self.version == (6, 12) if memory_failure is None else memory_failure
        self.zero_page = Page(ZERO, zero=True)
        self.huge_zero_page = Page(ZERO, HUGE_PAGE, zero=True)
        self.processes: list[Process] = []
        self.address_spaces: list[AddressSpace] = []
        self.files: list[File] = []
        self.notes: list[str] | None = None
        self._next_id = 1000
        self._contexts = 0

    def process(self, name: str = "process", *, privileged: bool = True) -> Process:
        """A new process with one thread and an empty address space."""
        return Process(self, name, privileged=privileged)

    @property
    def threads(self) -> list[Thread]:
        """Every thread of every process, in the order they were made."""
        return [thread for process in self.processes for thread in process.threads]

    def number(self) -> int:
        """The next process or thread id."""
        self._next_id += 1
        return self._next_id

    def number_contexts(self) -> int:
        """The next number of a userfaultfd, for its name in traces."""
        self._contexts += 1
        return self._contexts

    def mappings(self, file: File | None) -> Iterator[tuple[AddressSpace, Vma]]:
        """Every mapping of a file, in every address space (the file's i_mmap tree)."""
        for mm in self.address_spaces:
            if mm.alive:
                for vma in list(mm.vmas):
                    if vma.file is file:
                        yield mm, vma

    def note(self, text: str) -> None:
        """Say what the step that runs now changed; the trace shows it."""
        if self.notes is not None:
            self.notes.append(text)
