"""The explorer: finds what it should, proves what it says, and tells it so that a person can read it."""

from __future__ import annotations

import xml.etree.ElementTree as ET
from types import SimpleNamespace

import pytest

from userfault.model import (
    Kernel,
    Op,
    Pct,
    RandomWalks,
    SystemCalls,
    World,
    always,
    at_the_end,
    explore,
    fingerprint,
    nobody_hangs,
    nobody_spins,
)
from userfault.model.explorer.counterexample import Counterexample


def two_counters(steps: int = 2) -> World:
    """Two threads read a shared number, pause, and write back one more: the oldest race there is."""
    kernel = Kernel()
    app = kernel.process("app")
    books = SimpleNamespace(count=0)

    def add(t: SystemCalls) -> Op[None]:
        for _ in range(steps):
            yield from t.step("read the number")
            seen = books.count
            yield from t.step("write it back, one more")
            books.count = seen + 1

    app.spawn("T1", add)
    app.spawn("T2", add)
    return World(kernel, books)


@at_the_end("no addition is lost")
def nothing_lost(world: World) -> str | None:
    return None if world.books.count == 4 else f"the number is {world.books.count}"


def test_a_race_is_found_by_the_shortest_schedule() -> None:
    found = explore(two_counters, [nothing_lost], max_steps=20).found
    assert found is not None
    assert found.invariant == "no addition is lost"
    # Each thread takes four steps and one to finish, whatever the order.
    assert len(found.schedule) == 8


def test_the_number_of_schedules_is_the_number_of_ways_to_interleave() -> None:
    # Two threads of four steps each: 8 over 4.
    result = explore(two_counters, [], max_steps=20)
    assert result.exhausted
    assert result.schedules == 70
    assert result.steps < 8 * 70  # walking each of them would take so many


def test_a_bound_that_is_too_small_is_not_called_exhausted() -> None:
    result = explore(two_counters, [], max_steps=3)
    assert result.found is None
    assert not result.exhausted
    assert "not every interleaving" in str(result)


def test_too_many_states_are_not_called_exhausted() -> None:
    assert not explore(two_counters, [], max_steps=20, max_states=5).exhausted


@pytest.mark.parametrize(
    "strategy", [RandomWalks(200, seed=1), Pct(200, depth=3, seed=1), "random", "pct:500"]
)
def test_walks_find_the_race_and_shorten_it(strategy: RandomWalks | Pct | str) -> None:
    result = explore(two_counters, [nothing_lost], max_steps=20, strategy=strategy)
    assert result.found is not None
    assert not result.exhausted
    assert len(result.found.schedule) == 8


def test_the_same_seed_takes_the_same_walks() -> None:
    one, two = (explore(two_counters, [nothing_lost], strategy=RandomWalks(50, seed=7)) for _ in range(2))
    assert one.found is not None
    assert two.found is not None
    assert one.found.schedule == two.found.schedule
    assert (one.walks, one.steps) == (two.walks, two.steps)


@pytest.mark.parametrize("text", ["", "luck", "random:x", "pct:1:2:3:4", "random:-1"])
def test_an_unknown_strategy_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no strategy"):
        explore(two_counters, [], strategy=text)


def test_a_counterexample_replays_to_the_state_that_breaks_the_invariant() -> None:
    found = explore(two_counters, [nothing_lost], max_steps=20).found
    assert found is not None
    assert found.replay().books.count != 4


def test_a_schedule_of_another_scenario_is_refused() -> None:
    found = Counterexample("x", "y", (1,), two_counters)
    with pytest.raises(ValueError, match="cannot take step 0"):
        found.replay()


def test_an_invariant_may_be_broken_before_anything_runs() -> None:
    @always("never")
    def never(world: World) -> str | None:
        return "already"

    found = explore(two_counters, [never]).found
    assert found is not None
    assert found.schedule == ()


def test_what_a_program_raises_is_a_violation_with_a_trace() -> None:
    def build() -> World:
        kernel = Kernel()

        def program(t: SystemCalls) -> Op[None]:
            yield from t.step("think")
            raise RuntimeError("a mistake of the program")

        kernel.process("app").spawn("T1", program)
        return World(kernel)

    found = explore(build, []).found
    assert found is not None
    assert "a mistake of the program" in found.wrong
    assert "a mistake of the program" in str(found)


def test_a_thread_that_sleeps_for_ever_is_found() -> None:
    def build() -> World:
        kernel = Kernel()
        app = kernel.process("app")
        books = SimpleNamespace(said=False)

        def waiter(t: SystemCalls) -> Op[None]:
            yield from t.wait_for("a word", lambda: books.said)

        app.spawn("waiter", waiter)
        return World(kernel, books)

    found = explore(build, [nobody_hangs]).found
    assert found is not None
    assert found.wrong == "waiter cannot go on: wait for a word"
    daemon = lambda: World(build().kernel, daemons=frozenset(("waiter",)))  # noqa: E731
    assert explore(daemon, [nobody_hangs]).exhausted


def circles(way_out: bool) -> World:
    kernel = Kernel()
    app = kernel.process("app")
    books = SimpleNamespace(turn=0)

    def spinner(t: SystemCalls) -> Op[None]:
        while books.turn != 2:
            yield from t.step("look again")
            books.turn = (books.turn + 1) % 2 if books.turn < 2 else 2

    def opener(t: SystemCalls) -> Op[None]:
        yield from t.step("let it go")
        if way_out:
            books.turn = 2

    app.spawn("spinner", spinner)
    app.spawn("opener", opener)
    return World(kernel, books)


def test_running_in_circles_without_a_way_out_is_found_with_its_lap() -> None:
    found = explore(lambda: circles(way_out=False), [nobody_spins]).found
    assert found is not None
    assert found.lap == 2
    assert "for ever" in str(found)


def test_running_in_circles_is_fine_if_somebody_can_end_it() -> None:
    result = explore(lambda: circles(way_out=True), [nobody_spins])
    assert result.exhausted
    assert result.schedules is None  # as many as there are laps


def test_states_that_differ_only_in_the_rest_of_a_loop_are_not_the_same() -> None:
    """The rest of a `for` is an iterator on the generator's stack, in no variable."""

    def build(words: list[str]) -> World:
        kernel = Kernel()

        def program(t: SystemCalls, words: list[str]) -> Op[None]:
            for _ in list(words):
                yield "the same step"

        kernel.process("app").spawn("T1", lambda t: program(t, words))
        return World(kernel)

    world = build(["a", "b", "c"])
    prints = []
    for _ in range(3):
        world.step(world.threads[1])
        prints.append(fingerprint(world.kernel))
    assert len(set(prints)) == 3


def test_states_that_differ_only_in_a_half_computed_value_are_not_the_same() -> None:
    def build(number: int) -> World:
        kernel = Kernel()

        def one() -> Op[int]:
            yield "one"
            return 1

        def program(box: list[int]) -> Op[int]:
            return box.pop() + (yield from one())

        kernel.process("app").spawn("T1", lambda t: program([number]))
        world = World(kernel)
        world.step(world.threads[1])
        return world

    assert fingerprint(build(5).kernel) == fingerprint(build(5).kernel)
    assert fingerprint(build(5).kernel) != fingerprint(build(6).kernel)


def test_the_chart_is_a_picture_with_a_lifeline_for_each_thread() -> None:
    found = explore(two_counters, [nothing_lost], max_steps=20).found
    assert found is not None
    picture = ET.fromstring(found.to_svg())
    texts = ["".join(text.itertext()) for text in picture.iter("{http://www.w3.org/2000/svg}text")]
    assert {"T1", "T2", "write it back, one more"} <= set(texts)
    assert len(list(picture.iter("{http://www.w3.org/2000/svg}circle"))) == len(found.schedule)


def test_the_page_escapes_what_it_shows() -> None:
    def build() -> World:
        kernel = Kernel()

        def program(t: SystemCalls) -> Op[None]:
            yield from t.step("<b>&")
            raise RuntimeError("<script>")

        kernel.process("app").spawn("T1", program)
        return World(kernel)

    found = explore(build, []).found
    assert found is not None
    assert "<script>" not in found.to_html()
    assert "<b>" not in found.to_svg()
