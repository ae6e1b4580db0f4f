"""fork(2): a child with a copy of the address space [E8, E9].

descriptors    copied first: an unborn child already holds the userfaultfds open (E3: close releases no fork)
registration   with EVENT_FORK the child's VMAs get a context of their own; without, they get none
entries        private pages become shared by both, read-only, and are never exclusive again [F13]
               uffd-wp bits and markers only where the child is registered W; poison always [E12]
               shared mappings are not copied (they fault again), unless the child is registered W
event          one FORK for each context that asked, in turn; whoever reads it gets the child's descriptor
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from userfault import abi
from userfault.model import events
from userfault.model.context import Context
from userfault.model.layout import HUGE_PAGE, PUD_SPAN, round_down
from userfault.model.mm import AddressSpace
from userfault.model.pagetable import GUARD_MARKER, POISON_MARKER, Entry, Marker, Present, PteTable, Swap
from userfault.model.process import Process
from userfault.model.step import Op
from userfault.model.vma import NO_MODES, AnonVma, Vma

if TYPE_CHECKING:
    from userfault.model.thread import Thread


def fork(
    thread: Thread, program: Callable[[Thread], Op[Any]] | None = None, name: str = "child"
) -> Op[Process]:
    """fork(2): the child, which runs `program` on its main thread once it is born."""
    parent = thread.process
    mm = parent.mm
    yield "fork: copy the descriptors"
    descriptors = parent.descriptors.copy()
    child_mm = AddressSpace(mm.kernel, name)
    yield from mm.mmap_lock.write("fork: dup_mmap")
    contexts: list[tuple[Context, Context]] = []
    for vma in mm.vmas:
        if not vma.dontfork:
            yield from _copy_vma(mm, child_mm, vma, contexts)
    mm.mmap_lock.unwrite()
    for parents, childs in contexts:
        read = yield from events.post(thread, parents, abi.Fork(-1), childs)
        if not read:
            _abandon(childs)
    child = Process(mm.kernel, name, privileged=parent.privileged, mm=child_mm)
    child.descriptors = descriptors
    if program is not None:
        child.main.start(program(child.main))
    return child


def _copy_vma(
    mm: AddressSpace, child_mm: AddressSpace, vma: Vma, contexts: list[tuple[Context, Context]]
) -> Op[None]:
    """dup_mmap for one VMA, dup_userfaultfd, copy_page_range."""
    copy = replace(vma, locked=False, lock_on_fault=False)
    copy.uffd, copy.modes = None, NO_MODES
    ctx = vma.uffd
    if ctx is not None and ctx.has(abi.UFFD_FEATURE_EVENT_FORK):
        known = next((childs for parents, childs in contexts if parents is ctx), None)
        if known is None:
            known = Context(mm.kernel, child_mm, user_mode_only=ctx.user_mode_only)
            known.features, known.initialized = ctx.features, True
            yield from events.begin(ctx, "FORK")
            contexts.append((ctx, known))
        copy.uffd, copy.modes = known, vma.modes
    copy.anon_vma = None if vma.anon_vma is None else AnonVma(inherited=True)  # anon_vma_fork
    child_mm.insert(copy)
    if vma.wipeonfork:
        copy.anon_vma = None
    elif copy.modes.wp or vma.anonymous_pages:
        _copy_entries(mm, child_mm, vma, copy)


def _copy_entries(mm: AddressSpace, child_mm: AddressSpace, vma: Vma, copy: Vma) -> None:
    if vma.hugetlb:
        for at in range(round_down(vma.start, PUD_SPAN), vma.end, PUD_SPAN):
            if mm.table.pmd_table(at) is not None:  # the tables are copied also where nothing is in them
                child_mm.table.pmd_table_alloc(at)
    for at, _, pmd in list(mm.table.tables(vma.start, vma.end)):
        if type(pmd) is PteTable:
            child_mm.table.pte_table_alloc(at)
        else:
            kept = _copied(pmd, vma, copy)
            if vma.hugetlb or at % HUGE_PAGE == 0:
                _put(mm, child_mm, at, pmd, kept, huge=True)
    if not vma.hugetlb:
        for at, entry in list(mm.table.ptes(vma.start, vma.end)):
            _put(mm, child_mm, at, entry, _copied(entry, vma, copy), huge=False)


def _put(
    mm: AddressSpace, child_mm: AddressSpace, at: int, old: Entry, kept: Entry | None, *, huge: bool
) -> None:
    set_parent = mm.table.set_pmd if huge else mm.table.set_pte
    set_child = child_mm.table.set_pmd if huge else child_mm.table.set_pte
    if kept is None:
        return
    if type(kept) is Present and type(old) is Present and old.write and not kept.write:
        set_parent(at, old._replace(write=False))
    set_child(at, kept)


def _copied(entry: Entry, vma: Vma, copy: Vma) -> Entry | None:
    """What the child gets (copy_present_pte, copy_nonpresent_pte, copy_hugetlb_page_range)."""
    keeps_wp = copy.modes.wp
    if type(entry) is Present:
        page = entry.page
        private = not vma.shared
        if private:
            page.exclusive = False
        return Present(page, entry.write and not private, entry.uffd_wp and keeps_wp)
    if type(entry) is Swap:
        entry.slot.references += 1
        entry.slot.exclusive = False
        return Swap(entry.slot, entry.uffd_wp and keeps_wp)
    assert type(entry) is Marker
    if entry.poison:
        return POISON_MARKER
    if entry.guard:
        return GUARD_MARKER
    return entry if keeps_wp else None


def _abandon(child: Context) -> None:
    """Nobody read the FORK event: the child is not registered (userfaultfd_event_wait_completion's end)."""
    child.released = True
    for vma in child.mm.vmas:
        if vma.uffd is child:
            vma.uffd, vma.modes = None, NO_MODES
