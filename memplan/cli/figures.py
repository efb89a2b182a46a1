"""Figures in text: GiB and shares."""

from __future__ import annotations

from memplan.units import GIB


def gib(num_bytes: int) -> str:
    """GiB to two decimals, without the unit (columns carry it); what would print as 0.00 is told from nothing."""
    if num_bytes == 0:
        return "0"
    text = f"{num_bytes / GIB:,.2f}"
    return text if text not in ("0.00", "-0.00") else "<0.01"


def percent(part: float, whole: float) -> str:
    if not whole:
        return ""
    share = 100 * part / whole
    if share >= 10:
        return f"{share:.0f} %"
    if share >= 1:
        return f"{share:.1f} %"
    return f"{share:.2f} %" if share >= 0.01 or not part else "<0.01 %"
