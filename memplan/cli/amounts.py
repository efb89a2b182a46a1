"""Options that `cost` and `plan` share: amounts and prices."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Literal

import typer

from memplan.errors import MemplanError
from memplan.prices import Price

AMOUNT, PRICE = "Amount", "Price"
_SUFFIXES = {"k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}

NumTokens = Annotated[
    str | None,
    typer.Option(metavar="50M", help="Tokens to train on, in all.", rich_help_panel=AMOUNT, show_default=False),
]
PriceFile = Annotated[
    Path | None,
    typer.Option(
        "--prices",
        metavar="FILE.csv",
        help="Offers of your own: columns gpu, usd_per_hour, and if wanted provider, count, kind, region, as_of.",
        rich_help_panel=PRICE,
        show_default=False,
    ),
]
Hourly = Annotated[
    float | None,
    typer.Option(metavar="2.49", help="US dollars for an hour of the GPU.", rich_help_panel=PRICE, show_default=False),
]
Provider = Annotated[
    str | None,
    typer.Option(
        metavar="NAME",
        help="Whose prices to use; the lowest of all unless told.",
        rich_help_panel=PRICE,
        show_default=False,
    ),
]
PriceKind = Annotated[
    Literal["on-demand", "spot"],
    typer.Option("--kind", help="Prices that hold, or that may be withdrawn.", rich_help_panel=PRICE),
]
Live = Annotated[
    bool, typer.Option("--live", help="Today's offers from gpuhunt's online catalogue.", rich_help_panel=PRICE)
]


def parse_count(text: str | None, name: str) -> int | None:
    """`50M`, `1.5B`, `20_000` or `20000` as a whole number.

    Raises:
        MemplanError: not such a number, or not above zero.
    """
    if text is None:
        return None
    body = text.strip().lower().replace("_", "").replace(",", "")
    factor = _SUFFIXES.get(body[-1:], 1)
    try:
        value = float(body[:-1] if factor > 1 else body) * factor
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise MemplanError(f"{name} `{text}` is not a number", hints=["write it like 50M, 1.5B or 20000"])
    if value < 1:
        raise MemplanError(f"{name} must be above zero, not `{text}`")
    return int(value)


def offers(file: Path | None, *, live: bool, gpus: Iterable[str]) -> tuple[Price, ...] | None:
    """The offers that the options name; None for the bundled table.

    Raises:
        MemplanError: both were asked for, or they cannot be read.
    """
    from memplan.prices import from_gpuhunt, load_prices

    if file is not None and live:
        raise MemplanError("--prices and --live are both given", hints=["give one"])
    if file is not None:
        return load_prices(file)
    return tuple(row for gpu in gpus for row in from_gpuhunt(gpu)) if live else None
