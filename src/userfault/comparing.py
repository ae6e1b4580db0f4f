"""What differs between two points, told from their indexes: no block is read."""

from __future__ import annotations

from userfault import _native

__all__ = ["compare"]


def compare(first: _native.OpenPoint, second: _native.OpenPoint) -> dict[str, dict[str, int]]:
    """For each array `changed`, the bytes of blocks that differ, of `nbytes`; or `only_in`, a step.

    Arrays whose blocks are laid out otherwise count as changed whole. Raises CorruptError if an index is
    damaged.
    """
    before = {name: data for name, _, data in first.arrays()}
    after = {name: data for name, _, data in second.arrays()}
    changes: dict[str, dict[str, int]] = {}
    for name in [*before, *(name for name in after if name not in before)]:
        if name not in after or name not in before:
            changes[name] = {"only_in": first.step if name in before else second.step}
            continue
        old, new = first.store(before[name]), second.store(after[name])
        changed = new.nbytes
        if (old.lead, old.block, old.nbytes) == (new.lead, new.block, new.nbytes):
            differing = sum(a != b for a, b in zip(old.hashes(), new.hashes(), strict=True))
            changed = min(differing * new.block, new.nbytes)
        changes[name] = {"changed": changed, "nbytes": new.nbytes}
    return changes
