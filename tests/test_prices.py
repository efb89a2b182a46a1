"""Prices: bundled rows dated or marked undated, a user's list checked line by line, gpuhunt lazily."""

from __future__ import annotations

import datetime
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from memplan import gpus, prices
from memplan.errors import MemplanError, UnknownNameError
from memplan.prices import Price

TODAY = datetime.date(2026, 11, 22)


@pytest.mark.parametrize(
    "row", prices.prices(), ids=lambda row: f"{row.provider}-{row.instance}-{row.region}-{row.kind}"
)
def test_a_bundled_row_names_a_known_gpu_and_its_source(row: Price) -> None:
    assert gpus.get(row.gpu).name == row.gpu
    assert row.source
    assert row.region
    assert row.instance
    assert 0.1 < row.usd_per_gpu_hour < 20
    if row.as_of is None:
        assert row.age(TODAY) == "date not known"
    else:
        assert datetime.date(2023, 1, 1) < row.as_of <= TODAY
        assert row.age(TODAY) == f"as of {row.as_of} ({(TODAY - row.as_of).days} days old)"


def test_the_cheapest_offer_is_that_of_the_lowest_price_per_gpu() -> None:
    found = prices.cheapest("H200")
    assert found is not None
    assert (found.provider, found.usd_per_gpu_hour) == ("nebius", 3.5)
    aws = prices.cheapest("a100-40gb", provider="aws")
    assert aws is not None
    assert (aws.count, aws.region) == (8, "us-west-2")
    assert aws.usd_per_gpu_hour == pytest.approx(32.7726 / 8)
    assert (aws.usd_per_hour_for(1), aws.usd_per_hour_for(9)) == (aws.usd_per_hour, 2 * aws.usd_per_hour)
    spot = prices.cheapest("h200", kind="spot")
    assert spot is not None
    assert spot.usd_per_hour < found.usd_per_hour
    assert prices.cheapest("rtx-2060") is None
    assert prices.cheapest("h200", region="nowhere") is None
    with pytest.raises(UnknownNameError):
        prices.cheapest("h2000")


def test_a_list_needs_two_columns_and_takes_the_rest(tmp_path: Path) -> None:
    path = tmp_path / "mine.csv"
    path.write_text("gpu, usd_per_hour\nRTX 4090,0.5\n\nh200,$2.49\n")
    first, second = prices.load_prices(path)
    assert (first.gpu, first.provider, first.count, first.kind, first.as_of) == (
        "rtx-4090", "mine", 1, "on-demand", None,
    )  # fmt: skip
    assert second.usd_per_hour == 2.49
    path.write_text("usd_per_hour,gpu,count,kind,as_of,provider\n16,h100-sxm,8,spot,2026-11-01,us\n")
    (row,) = prices.load_prices(path)
    assert (row.usd_per_gpu_hour, row.kind, row.provider, row.age_days(TODAY)) == (2.0, "spot", "us", 21)
    assert prices.cheapest("h100-sxm", rows=[row], kind=None) is row


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("", "line 1: no column `gpu`"),
        ("gpu,price\nh200,3\n", "line 1: no column `usd_per_hour`"),
        ("gpu,usd_per_hour\nh200,3\nh200,cheap\n", "line 3: usd_per_hour `cheap`"),
        ("gpu,usd_per_hour\nh200,-1\n", "line 2: usd_per_hour `-1`"),
        ("gpu,usd_per_hour\nh200,nan\n", "line 2: usd_per_hour `nan`"),
        ("gpu,usd_per_hour\nh2000,3\n", "line 2: unknown GPU `h2000`"),
        ("gpu,usd_per_hour\na100,3\n", "line 2: GPU `a100` is ambiguous"),
        ("gpu,usd_per_hour,count\nh200,3,1.5\n", "line 2: count `1.5`"),
        ("gpu,usd_per_hour,count\nh200,3,0\n", "line 2: count `0`"),
        ("gpu,usd_per_hour,kind\nh200,3,reserved\n", "line 2: kind `reserved`"),
        ("gpu,usd_per_hour,as_of\nh200,3,yesterday\n", "line 2: as_of `yesterday`"),
        ("gpu,usd_per_hour\nh200\n", "line 2: usd_per_hour ``"),
    ],
)
def test_a_wrong_line_is_named_by_its_number(tmp_path: Path, content: str, says: str) -> None:
    path = tmp_path / "mine.csv"
    path.write_text(content)
    with pytest.raises(MemplanError) as caught:
        prices.load_prices(path)
    assert says in caught.value.message
    assert caught.value.message.startswith(str(path))


def test_a_file_that_is_no_list_is_refused(tmp_path: Path) -> None:
    with pytest.raises(MemplanError, match="No such file"):
        prices.load_prices(tmp_path / "none.csv")
    path = tmp_path / "binary.csv"
    path.write_bytes(b"\xff\xfe\x00\x93")
    with pytest.raises(MemplanError, match="not text"):
        prices.load_prices(path)


def fake_gpuhunt(*items: SimpleNamespace, error: str | None = None) -> SimpleNamespace:
    class GPUHuntError(Exception):
        pass

    def query(*, min_gpu_memory: float, max_gpu_memory: float, min_gpu_count: int) -> list[SimpleNamespace]:
        if error:
            raise GPUHuntError(error)
        return [i for i in items if min_gpu_memory <= i.gpu_memory <= max_gpu_memory and i.gpu_count >= min_gpu_count]

    return SimpleNamespace(GPUHuntError=GPUHuntError, query=query)


def offer(gpu_name: str | None, gpu_memory: float, price: float = 2.0, spot: bool = False) -> SimpleNamespace:
    return SimpleNamespace(
        provider="p", instance_name="i", location="l", price=price, gpu_count=1, gpu_name=gpu_name,
        gpu_memory=gpu_memory, spot=spot,
    )  # fmt: skip


def test_gpuhunts_offers_are_matched_by_name_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    items = [
        offer("A100", 40),
        offer("A100", 80, spot=True),
        offer("H100", 80),
        offer(None, 80),
        offer("A100", 80, 0),
    ]
    monkeypatch.setitem(sys.modules, "gpuhunt", fake_gpuhunt(*items))
    (found,) = prices.from_gpuhunt("a100-80gb")
    assert (found.gpu, found.kind, found.source, found.age_days()) == ("a100-80gb", "spot", "gpuhunt", 0)
    monkeypatch.setitem(sys.modules, "gpuhunt", fake_gpuhunt(offer("RTX4090", 24)))
    assert [row.gpu for row in prices.from_gpuhunt("rtx-4090")] == ["rtx-4090"]


def test_what_gpuhunt_logs_is_not_shown(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """It logs a traceback for every provider out of reach, which goes to stderr where nobody set logging up."""
    hunt = fake_gpuhunt()

    def query(**_: float) -> list[SimpleNamespace]:
        logging.getLogger("gpuhunt._internal.catalog").error("Failed to load aws catalog")
        raise hunt.GPUHuntError("Failed to load catalogs of all providers")

    hunt.query = query
    monkeypatch.setitem(sys.modules, "gpuhunt", hunt)
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    with pytest.raises(MemplanError, match="cannot be read"):
        prices.from_gpuhunt("h200")
    assert capsys.readouterr().err == ""
    logger = logging.getLogger("gpuhunt")
    assert logger.propagate
    assert not logger.handlers


def test_gpuhunt_missing_or_out_of_reach_is_said_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gpuhunt", fake_gpuhunt(error="Failed to load catalogs of all providers"))
    with pytest.raises(MemplanError, match="cannot be read: Failed to load") as caught:
        prices.from_gpuhunt("h200")
    assert any("--price" in hint for hint in caught.value.hints)
    monkeypatch.setitem(sys.modules, "gpuhunt", None)
    with pytest.raises(MemplanError) as caught:
        prices.from_gpuhunt("h200")
    assert caught.value.hints == ("pip install 'memplan[prices]'",)
    with pytest.raises(MemplanError, match="is a size"):
        prices.from_gpuhunt("24GiB")
