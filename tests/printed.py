"""What documentation shows against what is printed today: the same words and, within a tolerance, the same numbers."""

from __future__ import annotations

import re

NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")
# How far a printed number may be from the one shown before it must be written anew.
TOLERANCE = 0.02
ROUNDING = 0.02
"""Of a figure with two decimals, or twice the last digit of a whole one."""


def shape(line: str) -> str:
    """A line without its numbers, bars and spacing."""
    return " ".join(NUMBER.sub("#", re.sub("[━╸]+", "", line)).split())


def agree(shown: str, printed: str) -> bool:
    """The same words and, to within the tolerance, the same numbers."""
    if shape(shown) != shape(printed):
        return False
    pairs = zip(NUMBER.findall(shown), NUMBER.findall(printed), strict=True)
    return all(near(old, new) for old, new in pairs)


def near(old: str, new: str) -> bool:
    a, b = float(old.replace(",", "")), float(new.replace(",", ""))
    rounding = ROUNDING if "." in old else 2
    return abs(a - b) <= max(TOLERANCE * abs(a), rounding)
