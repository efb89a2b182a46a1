"""What an hour of a GPU costs: a small dated table, a user's own CSV, or gpuhunt's live catalogue.

Prices age. Every row carries the day it was read, or says that the day is not known, and whoever shows a
price shows its age.
"""

from __future__ import annotations

import csv
import datetime
import logging
import math
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Literal, get_args

from memplan import gpus
from memplan.errors import MemplanError

Kind = Literal["on-demand", "spot"]

_COLUMNS = ("provider", "instance", "gpu", "count", "usd_per_hour", "kind", "region", "as_of", "source")
_NEEDED = ("gpu", "usd_per_hour")
_MAX_FILE_BYTES = 16 * 2**20


@dataclass(frozen=True, slots=True)
class Price:
    """One offer: `count` GPUs together for `usd_per_hour`."""

    provider: str
    gpu: str
    """Name in the GPU table."""
    usd_per_hour: float
    """US dollars per hour for the whole instance, its `count` GPUs and the machine around them."""
    count: int = 1
    kind: Kind = "on-demand"
    region: str = ""
    instance: str = ""
    as_of: datetime.date | None = None
    """The day the price was read; None where the source does not say."""
    source: str = ""

    @property
    def usd_per_gpu_hour(self) -> float:
        return self.usd_per_hour / self.count

    def usd_per_hour_for(self, num_gpus: int) -> float:
        """US dollars per hour for `num_gpus` GPUs, rented in whole instances."""
        return self.usd_per_hour * math.ceil(num_gpus / self.count)

    def age_days(self, today: datetime.date | None = None) -> int | None:
        """Days since the price was read; None where the day is not known."""
        return None if self.as_of is None else ((today or datetime.date.today()) - self.as_of).days

    def age(self, today: datetime.date | None = None) -> str:
        """The age in words, to stand beside every price shown."""
        days = self.age_days(today)
        return "date not known" if days is None else f"as of {self.as_of} ({days} days old)"


@cache
def prices() -> tuple[Price, ...]:
    """The bundled table."""
    text = files("memplan").joinpath("data/prices.csv").read_text(encoding="utf-8")
    return tuple(_parse(text.splitlines(), "prices.csv"))


def cheapest(
    gpu: str,
    *,
    rows: Iterable[Price] | None = None,
    kind: Kind | None = "on-demand",
    provider: str | None = None,
    region: str | None = None,
) -> Price | None:
    """The lowest price per GPU and hour among `rows` (the bundled table unless given); None without an offer.

    Raises:
        MemplanError: `gpu` is not the name of one GPU.
    """
    name = gpus.get(gpu).name
    offers = [
        row
        for row in (prices() if rows is None else rows)
        if row.gpu == name
        and (kind is None or row.kind == kind)
        and (provider is None or row.provider == provider)
        and (region is None or row.region == region)
    ]
    return min(offers, key=lambda row: row.usd_per_gpu_hour, default=None)


def load_prices(path: str | Path) -> tuple[Price, ...]:
    """The offers of a CSV file with a header.

    It needs the columns `gpu` and `usd_per_hour`, and may have `provider`, `instance`, `count`, `kind`
    (on-demand or spot), `region`, `as_of` (YYYY-MM-DD) and `source`.

    Raises:
        MemplanError: not readable, or a line that is wrong, named by its number.
    """
    path = Path(path)
    try:
        if path.stat().st_size > _MAX_FILE_BYTES:
            raise MemplanError(f"{path}: above {_MAX_FILE_BYTES // 2**20} MiB, too large for a price list")
        text = path.read_text(encoding="utf-8-sig")
    except OSError as error:
        raise MemplanError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise MemplanError(f"{path}: not text") from None
    return tuple(_parse(text.splitlines(), str(path)))


def _parse(lines: list[str], where: str) -> Iterable[Price]:
    reader = csv.DictReader(lines)
    header = [name.strip() for name in reader.fieldnames or ()]
    missing = [name for name in _NEEDED if name not in header]
    if missing:
        raise MemplanError(f"{where}: line 1: no column `{missing[0]}`", hints=["columns: " + ", ".join(_COLUMNS)])
    reader.fieldnames = header
    try:
        for line in reader:
            fields = {k: v.strip() for k, v in line.items() if isinstance(k, str) and isinstance(v, str)}
            if not any(fields.values()):
                continue
            yield _row(fields, f"{where}: line {reader.line_num}", Path(where).stem)
    except csv.Error as error:
        raise MemplanError(f"{where}: line {reader.line_num}: {error}") from None


def _row(fields: dict[str, str], where: str, default_provider: str) -> Price:
    try:
        gpu = gpus.get(fields.get("gpu", "")).name
    except MemplanError as error:
        raise MemplanError(f"{where}: {error.message}", hints=error.hints) from None
    kind = fields.get("kind") or "on-demand"
    if kind not in get_args(Kind):
        raise MemplanError(f"{where}: kind `{kind}` is neither `on-demand` nor `spot`")
    count = _number(fields.get("count") or "1", "count", where)
    if count != int(count):
        raise MemplanError(f"{where}: count `{fields['count']}` is not a whole number")
    try:
        as_of = datetime.date.fromisoformat(fields["as_of"]) if fields.get("as_of") else None
    except ValueError:
        raise MemplanError(f"{where}: as_of `{fields['as_of']}` is not a date like 2026-11-22") from None
    return Price(
        provider=fields.get("provider") or default_provider,
        gpu=gpu,
        usd_per_hour=_number(fields.get("usd_per_hour", ""), "usd_per_hour", where),
        count=int(count),
        kind="spot" if kind == "spot" else "on-demand",
        region=fields.get("region", ""),
        instance=fields.get("instance", ""),
        as_of=as_of,
        source=fields.get("source") or where.partition(": line")[0],
    )


def _number(text: str, column: str, where: str) -> float:
    try:
        value = float(text.removeprefix("$"))
    except ValueError:
        value = math.nan
    if not 0 < value < 1e6:
        raise MemplanError(f"{where}: {column} `{text}` is not a number above zero")
    return value


@contextmanager
def _quiet(name: str) -> Iterator[None]:
    """Without what the package `name` logs: gpuhunt logs a traceback for each provider that it cannot reach."""
    logger = logging.getLogger(name)
    before = logger.propagate
    handler = logging.NullHandler()
    logger.addHandler(handler)
    logger.propagate = False
    try:
        yield
    finally:
        logger.propagate = before
        logger.removeHandler(handler)


def from_gpuhunt(gpu: str) -> tuple[Price, ...]:
    """Today's offers of `gpu` from gpuhunt's online catalogue (it does not tell SXM from PCIe).

    Raises:
        MemplanError: `gpu` is not the name of one GPU, or gpuhunt is missing or cannot be read.
    """
    row = gpus.get(gpu)
    if row.nominal_gb is None:
        raise MemplanError(f"`{gpu}` is a size, and offers go by GPU", hints=["name the GPU, such as `rtx-4090`"])
    try:
        import gpuhunt
    except ImportError:
        raise MemplanError(
            "online prices need the package `gpuhunt`", hints=["pip install 'memplan[prices]'"]
        ) from None
    low, high = 0.95 * row.nominal_gb, 1.05 * row.nominal_gb
    try:
        with _quiet("gpuhunt"):
            items = gpuhunt.query(min_gpu_memory=low, max_gpu_memory=high, min_gpu_count=1)
    except (gpuhunt.GPUHuntError, OSError) as error:
        raise MemplanError(
            f"gpuhunt's catalogue cannot be read: {error}",
            hints=["give a price with `--price 2.49`, or a list with `--prices file.csv`"],
        ) from None
    today = datetime.date.today()
    return tuple(
        Price(
            provider=item.provider,
            gpu=row.name,
            usd_per_hour=item.price,
            count=item.gpu_count,
            kind="spot" if item.spot else "on-demand",
            region=item.location,
            instance=item.instance_name,
            as_of=today,
            source="gpuhunt",
        )
        for item in items
        if item.gpu_name and row in gpus.candidates(item.gpu_name) and item.price > 0
    )
