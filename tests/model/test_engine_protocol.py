"""The engine's protocol: every wrong rule is found, the right ones survive every interleaving."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from model.timing import timed
from userfault.model import Pct, explore
from userfault.model.scenarios import engine
from userfault.model.scenarios.engine.block import CLAIMS, Answer, Fault, Purpose, State, answer

ROOT = Path(__file__).parent.parent.parent
HAZARDS = {"C1", "C2", "C3", "C4", "C7", "C8", "C9", "D1", "D2", "D3", "R1", "R2", "W1", "W2", "W3"}
QUICK = [name for name in engine.SITUATIONS if name != "everything"]


def test_every_hazard_has_a_wrong_rule() -> None:
    assert {rule.tag for rule in engine.RULES.values()} == HAZARDS


@pytest.mark.parametrize("name", engine.RULES)
def test_a_wrong_rule_is_found(name: str) -> None:
    result, seconds = timed(engine.scenario(engine.RULES[name].situation, (name,)))
    assert result.found is not None
    assert seconds < 30


@pytest.mark.parametrize("situation", QUICK)
def test_the_right_rules_survive_every_interleaving(situation: str) -> None:
    result = explore(engine.scenario(situation))
    assert result.exhausted, str(result)


@pytest.mark.soak
def test_the_right_rules_survive_everything_at_once() -> None:
    result = explore(engine.scenario("everything"))
    assert result.exhausted, str(result)


def test_walks_find_nothing_in_everything_at_once() -> None:
    assert explore(engine.scenario("everything"), strategy=Pct(300, depth=4, seed=1)).ok


@pytest.mark.parametrize("rule", ["scans_without_owning", "maps_what_is_owned", "one_dirty_map"])
def test_walks_through_everything_at_once_find_wrong_rules_too(rule: str) -> None:
    result = explore(engine.scenario("everything", (rule,)), strategy=Pct(3000, depth=4, seed=1))
    assert result.found is not None


def test_an_unknown_rule_is_refused() -> None:
    with pytest.raises(ValueError, match="no such rules: luck"):
        explore(engine.scenario("evict", ("luck",)))


@pytest.fixture(scope="module")
def rust() -> str:
    path = ROOT / "crates" / "engine" / "src" / "block.rs"
    if not path.exists():
        pytest.skip("the engine's source is not here (a package without the repository)")
    return path.read_text().split("#[cfg(test)]")[0]


def test_the_claims_are_those_of_the_engine(rust: str) -> None:
    arms = re.findall(r"\(Purpose::(\w+), ([\w |]+)\) => Some\((\w+)\)", rust)
    theirs = {
        (Purpose(purpose), State(state.strip())): State(after)
        for purpose, states, after in arms
        for state in states.split("|")
    }
    assert theirs == CLAIMS


def test_the_states_are_those_of_the_engine(rust: str) -> None:
    declared = re.search(r"pub const ALL: \[State; 9\] = \[(.*?)\];", rust, re.S)
    assert declared is not None
    assert re.findall(r"State::(\w+)", declared[1]) == [state.value for state in State]
    assert "self as u8 >= State::Filling as u8" in rust
    states = list(State)
    assert [state.exclusive for state in states] == [n >= states.index(State.FILLING) for n in range(9)]


def test_the_answers_are_those_of_the_engine(rust: str) -> None:
    body = re.search(r"pub fn answer\(.*?\n}", rust, re.S)
    assert body is not None
    theirs = {
        State(state): Answer(what) for state, what in re.findall(r"State::(\w+) => Answer::(\w+),", body[0])
    }
    for state, what in theirs.items():
        assert {answer(state, fault, lambda: True) for fault in Fault} == {what}
    assert set(theirs) == {State.ABSENT, State.POISONED, State.RESTING}
    assert "State::Cleaning if fault == Fault::WriteProtect => Answer::Unprotect," in body[0]
    assert answer(State.CLEANING, Fault.WRITE_PROTECT, lambda: True) is Answer.UNPROTECT
    assert answer(State.CLEANING, Fault.MINOR, lambda: True) is Answer.WAIT
    waiting = re.search(r"((?:State::\w+[ |]+)+)=> \{\s*Answer::Wait", body[0])
    assert waiting is not None
    assert {State(name) for name in re.findall(r"State::(\w+)", waiting[1])} == {
        state for state in State if state.exclusive
    }
    resident = body[0].split("State::Resident => match fault")[1]
    assert re.sub(r"\s+", " ", resident).startswith(
        " { Fault::WriteProtect => Answer::Unprotect, _ if present() => Answer::Wake, "
        "Fault::Minor => Answer::MapDirty, Fault::Missing => Answer::Refill, }"
    )
    for fault, present, what in (
        (Fault.WRITE_PROTECT, True, Answer.UNPROTECT),
        (Fault.MINOR, True, Answer.WAKE),
        (Fault.MISSING, True, Answer.WAKE),
        (Fault.MINOR, False, Answer.MAP_DIRTY),
        (Fault.MISSING, False, Answer.REFILL),
    ):
        assert answer(State.RESIDENT, fault, lambda p=present: p) is what
