"""Bytes in, text out. Inside memplan every size is an `int` of bytes; GiB exist only in text."""

from __future__ import annotations

import re

from memplan.errors import MemplanError

KIB = 1024
MIB = 1024 * KIB
GIB = 1024 * MIB

_FACTORS = {"kib": KIB, "mib": MIB, "gib": GIB, "tib": 1024 * GIB,
            "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}  # fmt: skip
_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([a-z]+)?", re.IGNORECASE)


def gib(num_bytes: int) -> str:
    """`num_bytes` as text in GiB (2**30 bytes), to two decimals."""
    return f"{num_bytes / GIB:.2f} GiB"


def human(num_bytes: int) -> str:
    """`num_bytes` in the largest binary unit that keeps the figure at 1 or above."""
    for unit, factor in (("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(num_bytes) >= factor:
            return f"{num_bytes / factor:,.2f} {unit}"
    return f"{num_bytes} B"


def exact_percent(share: float, digits: int, *, sign: str = "") -> str:
    """A share of 1 with as many digits as asked for; `sign="+"` writes the plus too."""
    return f"{100 * share:{sign}.{digits}f} %"


def hours_text(hours: float) -> str:
    """Hours as people say them."""
    if hours < 1 / 60:
        return f"{hours * 3600:.0f} s"
    if hours < 2:
        return f"{hours * 60:.0f} min"
    return f"{hours:.1f} h" if hours < 100 else f"{hours / 24:,.1f} days"


def dollars_text(dollars: float | None) -> str:
    """Dollars to the cent, above a thousand to the dollar."""
    if dollars is None:
        return "no price"
    if 0 < dollars < 0.005:
        return "<$0.01"
    return f"${dollars:.2f}" if dollars < 1000 else f"${dollars:,.0f}"


def parse_size(text: str) -> int:
    """Bytes of `24GiB`, `24 GB` or `24576MiB`.

    Raises:
        MemplanError: no number, no unit (`24` could mean either), an unknown unit, or not above zero.
    """
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise MemplanError(f"`{text}` is not a size", hints=["write it like `24GiB`, `24GB` or `24576MiB`"])
    number, unit = match.groups()
    if unit is None:
        raise MemplanError(
            f"`{text}` has no unit", hints=[f"write `{number}GiB` (2**30 bytes) or `{number}GB` (10**9 bytes)"]
        )
    factor = _FACTORS.get(unit.lower())
    if factor is None:
        raise MemplanError(f"`{unit}` is not a unit of memory", hints=["units: KiB, MiB, GiB, TiB, KB, MB, GB, TB"])
    size = int(float(number) * factor)
    if size <= 0:
        raise MemplanError(f"`{text}` is not above zero")
    return size
