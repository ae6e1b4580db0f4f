"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from userfault.sizes import in_words, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("4096", 4096),
        ("256MiB", 256 << 20),
        ("8GiB", 8 << 30),
        ("1.5 GiB", 3 << 29),
        ("2 TB", 2 * 10**12),
        ("64kB", 64_000),
        ("64KB", 64_000),
        ("64KiB", 65_536),
        (" 12 B ", 12),
        ("1pib", 1 << 50),
    ],
)
def test_text_is_a_size(text: str, size: int) -> None:
    assert parse_size(text) == size


@given(st.integers(0, 1 << 62))
def test_a_number_is_itself_as_number_and_as_text(size: int) -> None:
    assert parse_size(size) == size == parse_size(str(size)) == parse_size(f"{size} B")


@pytest.mark.parametrize(
    "text", ["", "MiB", "256M", "12i", "-1", "1e9", "0.3 B", "256 MiB extra", "٣", "1,5GB"]
)
def test_other_text_is_refused_and_the_message_names_the_argument(text: str) -> None:
    with pytest.raises(ValueError, match="memory_limit"):
        parse_size(text, "memory_limit")


@pytest.mark.parametrize("value", [1.5, None, True, b"1"])
def test_what_is_neither_text_nor_integer_is_a_type_error(value: object) -> None:
    with pytest.raises(TypeError, match="block"):
        parse_size(value, "block")  # type: ignore[arg-type]


def test_negative_sizes_are_refused() -> None:
    with pytest.raises(ValueError, match="never negative"):
        parse_size(-1)


def test_sizes_are_said_in_the_unit_that_reads_best() -> None:
    assert [in_words(n) for n in (0, 1023, 1024, 1536, 256 << 20, 5 << 40, 5000 << 40)] == [
        "0 B", "1023 B", "1 KiB", "1.5 KiB", "256 MiB", "5 TiB", "5000 TiB",
    ]  # fmt: skip
