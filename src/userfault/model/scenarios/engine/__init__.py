"""The engine's own protocol as scenarios: a block table against the kernel's events.

block.py        the states of a block and what a fault asks, as in `crates/engine/src/block.rs`
rules.py        the rules that can be got wrong, each with the hazard it is there for
protocol.py     fault loop, eviction, write-back, pwrite and checkpoint, step by step
synchronous.py  the same where the first write to a page is a message: older kernels
situations.py   small situations; with right rules each is exhausted, with a wrong one its harm is found
"""

from userfault.model.scenarios.engine.rules import RULES, Rule
from userfault.model.scenarios.engine.situations import SITUATIONS, scenario

__all__ = ["RULES", "SITUATIONS", "Rule", "scenario"]
