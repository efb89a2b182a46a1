"""The two searches against the plain walk over all values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.search import last_not_negative, last_true_below

LIMIT = 2**22


@given(last=st.integers(0, LIMIT), start=st.integers(1, 2 * LIMIT), slope=st.integers(1, 10**9))
def test_last_not_negative_on_a_line(last: int, start: int, slope: int) -> None:
    asked: list[int] = []

    def spare(value: int) -> int:
        asked.append(value)
        return (last - value) * slope

    assert last_not_negative(spare, start, LIMIT) == last
    assert len(asked) == len(set(asked)) <= 40
    assert all(1 <= value <= LIMIT for value in asked)


@given(drops=st.lists(st.integers(0, 10**6), min_size=1, max_size=200), first=st.integers(-10, 10**7),
       start=st.integers(1, 300))  # fmt: skip
def test_last_not_negative_on_any_falling_row(drops: list[int], first: int, start: int) -> None:
    row = [first]
    for drop in drops:
        row.append(row[-1] - drop)
    expected = max((value for value, spare in enumerate(row, 1) if spare >= 0), default=0)
    assert last_not_negative(lambda value: row[value - 1], start, len(row)) == expected


@given(last=st.integers(0, 5000), above=st.integers(0, 5000))
def test_last_true_below_finds_the_edge(last: int, above: int) -> None:
    bound = last + above
    asked: list[int] = []

    def holds(value: int) -> bool:
        assert 1 <= value <= bound
        asked.append(value)
        return value <= last

    assert last_true_below(holds, bound) == last
    assert len(asked) <= 30
