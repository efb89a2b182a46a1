"""Finding the last integer up to which something holds, with few evaluations."""

from __future__ import annotations

from collections.abc import Callable


def last_not_negative(spare: Callable[[int], int], start: int, limit: int) -> int:
    """The largest value in [1, limit] with `spare(value) >= 0`; 0 if there is none.

    `spare` falls with its argument, nearly along straight lines (bytes left against tokens or rank), so that a line
    through the two nearest points known finds it in a handful of steps; every third step halves the interval.
    """
    good, bad = 0, limit + 1
    good_spare: int | None = None
    bad_spare: int | None = None
    value, steps = min(max(start, 1), limit), 0
    while bad - good > 1:
        found = spare(value)
        if found >= 0:
            good, good_spare = value, found
        else:
            bad, bad_spare = value, found
        steps += 1
        if bad > limit:
            value = min(good * 4, limit)
        elif good == 0 and good_spare is None:
            value = max(bad // 4, 1)
        elif steps % 3 and good_spare is not None and bad_spare is not None:
            value = good + (bad - good) * good_spare // (good_spare - bad_spare)
        else:
            value = (good + bad) // 2
        value = min(max(value, good + 1), bad - 1) if bad - good > 1 else value
    return good


def last_true_below(holds: Callable[[int], bool], bound: int) -> int:
    """The largest value in [1, bound] for which `holds`, true up to some value not far below `bound`; else 0."""
    good, bad, step = bound, bound + 1, max(bound // 64, 1)
    while good > 0 and not holds(good):
        bad, good = good, good - step
        step *= 2
    good = max(good, 0)
    while bad - good > 1:
        middle = (good + bad) // 2
        if holds(middle):
            good = middle
        else:
            bad = middle
    return good
