"""Finding the last integer up to which something holds, with few evaluations."""

from __future__ import annotations

from collections.abc import Callable, Iterable

Spare = Callable[[int], int]


def last_not_negative(spare: Spare, start: int, limit: int, *, tolerance: float = 0.0) -> tuple[int, int]:
    """A value in [1, limit] with `spare(value) >= 0`, and one above it without; 0 and `limit + 1` stand for none.

    They are neighbours, or as near as `tolerance`, a share of the upper one. `spare` falls with its argument, nearly
    along straight lines (bytes left against tokens or rank), so that a line through the two nearest points known
    finds the border in a handful of steps; every third step halves the interval.
    """
    good, bad = 0, limit + 1
    good_spare: int | None = None
    bad_spare: int | None = None
    value, steps = min(max(start, 1), limit), 0
    while bad - good > 1 and (good == 0 or bad > limit or bad - good > tolerance * bad):
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
    return good, bad


class Border:
    """The border of a `spare` that is dear to ask, jumps in steps, and says less below 0 than above.

    The allocator rounds in powers of two, so that many borders lie at a round number of tokens: the search asks round
    numbers first and, once near, their neighbour.
    """

    def __init__(self, spare: Spare, bad: int) -> None:
        self._spare = spare
        self.good, self.bad = 0, bad
        self._line: list[tuple[int, int]] = []  # two values far apart with bytes to spare

    def ask(self, value: int) -> bool:
        """Learns whether `value` holds."""
        found = self._spare(value)
        if found < 0:
            self.bad = value
            return False
        if found and (not self._line or (value - self.good) * 4 > self.bad - value):
            self._line = [*self._line[-1:], (value, found)]
        self.good = value
        return True

    def ask_between(self, *values: int) -> None:
        """Learns whether each of `values` holds, as far as that is not known yet."""
        for value in values:
            if self.good < value < self.bad:
                self.ask(value)

    def find(self, guesses: Iterable[int]) -> int:
        """The last value that holds; 0 for none. `guesses` are asked first, until one holds."""
        for guess in guesses:
            if self.bad - self.good > 1 and self.ask(min(max(guess, self.good + 1), self.bad - 1)):
                break
        while self.bad - self.good > 1:
            width = self.bad - self.good
            value, margin = (self.good + self.bad) // 2, width // 4
            crossing = self._crossing()
            if crossing is not None:
                value, margin = crossing, min(width, 4 * (crossing - self.good)) // 16
            near = roundest(max(value - margin, self.good + 1), min(value + margin, self.bad - 1))
            beside = near + 1 if self.ask(near) else near - 1
            if near % 64 == 0 and width <= min(4 * (near & -near), 1024) and self.good < beside < self.bad:
                self.ask(beside)
        return self.good

    def _crossing(self) -> int | None:
        """Where the line through what is known meets 0; used up once it has been asked about."""
        if len(self._line) < 2:
            return None
        (a, spare_a), (b, spare_b) = self._line
        self._line = self._line[-1:]
        value = b + (b - a) * spare_b // (spare_a - spare_b) if spare_a > spare_b else 0
        return value if self.good < value < self.bad else None


def roundest(low: int, high: int) -> int:
    """The integer in [low, high], 1 or more, that the largest power of two divides."""
    step = 1 << high.bit_length()
    while (value := high // step * step) < low:
        step //= 2
    return value
