"""The two searches against the plain walk over all values."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from memplan.search import Border, last_not_negative, roundest

LIMIT = 2**22


@given(last=st.integers(0, LIMIT), start=st.integers(1, 2 * LIMIT), slope=st.integers(1, 10**9))
def test_last_not_negative_on_a_line(last: int, start: int, slope: int) -> None:
    asked: list[int] = []

    def spare(value: int) -> int:
        asked.append(value)
        return (last - value) * slope

    assert last_not_negative(spare, start, LIMIT) == (last, last + 1)
    assert len(asked) == len(set(asked)) <= 40
    assert all(1 <= value <= LIMIT for value in asked)


@given(drops=st.lists(st.integers(0, 10**6), min_size=1, max_size=200), first=st.integers(-10, 10**7),
       start=st.integers(1, 300))  # fmt: skip
def test_last_not_negative_on_any_falling_row(drops: list[int], first: int, start: int) -> None:
    row = [first]
    for drop in drops:
        row.append(row[-1] - drop)
    expected = max((value for value, spare in enumerate(row, 1) if spare >= 0), default=0)
    assert last_not_negative(lambda value: row[value - 1], start, len(row))[0] == expected


@given(last=st.integers(1, LIMIT - 1), start=st.integers(1, LIMIT), tolerance=st.sampled_from([0.5, 0.125, 0.01]))
def test_last_not_negative_may_stop_near(last: int, start: int, tolerance: float) -> None:
    good, bad = last_not_negative(lambda value: (last - value) * 7, start, LIMIT, tolerance=tolerance)
    assert 0 < good <= last < bad <= LIMIT
    assert bad - good <= max(tolerance * bad, 1)


@given(last=st.integers(0, 5000), above=st.integers(0, 5000), step=st.sampled_from([1, 64, 700]),
       guesses=st.lists(st.integers(-10, 12000), max_size=3), start=st.integers(0, 5000))  # fmt: skip
def test_border_of_steps(last: int, above: int, step: int, guesses: list[int], start: int) -> None:
    """Below 0 the bytes missing say nothing; above, they fall in steps, and are 0 for a while."""
    bound = last + above
    asked: list[int] = []

    def spare(value: int) -> int:
        assert 1 <= value <= bound
        asked.append(value)
        return -1 if value > last else max((last - value) // step * step - 64, 0)

    border = Border(spare, bound + 1)
    if 0 < start <= bound:
        border.ask(start)
    assert border.find(guesses) == last
    assert len(asked) == len(set(asked)) <= 45


@given(values=st.lists(st.booleans(), min_size=1, max_size=300), guess=st.integers(1, 300))
def test_border_is_one_even_where_there_are_several(values: list[bool], guess: int) -> None:
    border = Border(lambda value: 0 if values[value - 1] else -1, len(values) + 1)
    found = border.find([guess])
    assert found == 0 or values[found - 1]
    assert found == len(values) or not values[found]


@given(low=st.integers(1, 10**6), more=st.integers(0, 10**4))
def test_roundest(low: int, more: int) -> None:
    found = roundest(low, low + more)
    assert low <= found <= low + more
    assert all(value & -value <= found & -found for value in range(low, low + more + 1, max(more // 500, 1)))
