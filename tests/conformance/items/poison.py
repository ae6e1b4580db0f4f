"""`poison`: pages that raise SIGBUS."""

from __future__ import annotations

from conformance.backend import ALL, Backend, Kind
from conformance.checklist import item
from conformance.setting import MISSING, content, done, fault, page_at, setting
from userfault import abi
from userfault.abi import Message, Outcome, Pagefault


@item("poison.mask", *ALL)
def missing_offers_copy_and_poison(backend: Backend, kind: Kind) -> None:
    _, uffd, area = setting(backend, kind, MISSING, abi.UFFD_FEATURE_POISON)
    mask = done(uffd.register(area.start, area.length, MISSING))
    assert mask & 1 << abi._UFFDIO_COPY
    assert mask & 1 << abi._UFFDIO_POISON


def poison_every_other_page(
    backend: Backend, kind: Kind
) -> tuple[list[str | None], list[Outcome], list[Pagefault], int]:
    process, uffd, area = setting(backend, kind, MISSING, abi.UFFD_FEATURE_POISON)
    toucher = process.thread()
    poisoned: list[Outcome] = []
    faults: list[Pagefault] = []

    def answer(message: Message) -> None:
        faults.append(fault(message))
        page = page_at(area, faults[-1].address)
        if (page - area.start) // area.page % 2 == 0:
            poisoned.append(uffd.poison(page, area.page))
        else:
            done(uffd.copy(page, content(area, 0)))

    signals = [backend.serve(toucher.load(address), uffd, answer).signal for address in area.pages]
    return signals, poisoned, faults, area.page


@item("poison.half", *ALL)
def exactly_the_poisoned_pages_raise_sigbus(backend: Backend, kind: Kind) -> None:
    signals, _, _, _ = poison_every_other_page(backend, kind)
    assert signals == ["SIGBUS", None] * (len(signals) // 2)


@item("poison.result", *ALL)
def poison_reports_one_page_and_the_faults_were_plain(backend: Backend, kind: Kind) -> None:
    signals, poisoned, faults, page = poison_every_other_page(backend, kind)
    assert poisoned == [(page, 0)] * (len(signals) // 2)
    assert len(faults) == len(signals)
    special = abi.UFFD_PAGEFAULT_FLAG_WP | abi.UFFD_PAGEFAULT_FLAG_MINOR
    assert not any(f.flags & special for f in faults)
