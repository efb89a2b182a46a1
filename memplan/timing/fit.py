"""`python -m memplan.timing.fit --out timing.json records.jsonl ...`: fit the constants on measured steps.

Rows are split by a seeded hash of the run (not of its repeats, which stay together), constants are fitted on one part
and scored on the other: median, 90th percentile and bias of the relative error, launch-bound and device-bound rows
apart. The fit minimises the Huber loss of log(predicted / measured) by Gauss-Newton over the logarithms of the
constants, with a weak pull to where they start, which keeps a constant that no row tells anything about. Launch-bound
rows weigh less: repeats of one such run differed by 15 to 40 % between hosts and processes, those of a device-bound
one by 1 % (7B runs measured twice on H200s).
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from memplan import gpus
from memplan.gpus import GpuSpec
from memplan.timing.model import LAUNCHES
from memplan.timing.roofline import Constants
from memplan.timing.rows import Row, load_rows
from memplan.units import exact_percent

HUBER = 0.15
NOISE = 0.1
"""Typical error of a row, to weigh the pull to the start against it."""
WIDTHS = {"matmul": 0.1, "stream": 0.1, "kernel": 0.3}
"""How far (in logarithm) a constant may be expected from its start where that is known beforehand; 1 for the others."""
LAUNCH_BOUND_WEIGHT = 0.3
NAMES = tuple(field.name for field in dataclasses.fields(Constants))
TOGETHER = {
    "arithmetic": ("matmul", "matmul_fp32", "flash", "efficient", "attention_fp32"),
    "bandwidth": ("stream", "dequantise", "blockwise"),
    "host": tuple(name for name in NAMES if name.startswith(("launch_", "per_"))),
}
"""Constants that another machine shifts by one factor: its clocks, its memory, its processor. Few runs tell those, not
each constant: fitted one by one on 22 runs of an H100, most of them launch-bound, the others came out 20 % too slow."""
TOGETHER_WIDTHS = {"arithmetic": 0.1, "bandwidth": 0.1, "host": 0.5}
app = typer.Typer(add_completion=False, pretty_exceptions_enable=False)


def fit(rows: Sequence[Row], gpu: GpuSpec, *, start: Constants | None = None, together: bool = False) -> Constants:
    """The constants under which `rows` come out best; which rows are launch-bound is judged by a first fit.

    Args:
        together: move `start` by the factors of `TOGETHER` alone, not each constant.
    """
    begin = constants = start or Constants()
    for _ in range(2):
        constants = _fit(rows, gpu, begin, [_weight(row, gpu, constants) for row in rows], together=together)
    return constants


def cross_validate(
    rows: Sequence[Row],
    gpu: GpuSpec,
    *,
    start: Constants | None = None,
    together: bool = False,
    num_folds: int = 4,
) -> dict[str, float]:
    """Errors of all rows, each predicted by constants that were fitted without its fold."""
    errors: list[float] = []
    for fold in range(num_folds):
        inside = [int(row.place * num_folds) == fold for row in rows]
        others = [row for row, out in zip(rows, inside, strict=True) if not out]
        constants = fit(others, gpu, start=start, together=together)
        left = [row for row, out in zip(rows, inside, strict=True) if out]
        errors += [row.predict(gpu, constants).step_seconds / row.seconds - 1 for row in left]
    return _summary(errors)


def _weight(row: Row, gpu: GpuSpec, constants: Constants) -> float:
    return LAUNCH_BOUND_WEIGHT if row.predict(gpu, constants).bound_by == LAUNCHES else 1.0


def _fit(
    rows: Sequence[Row], gpu: GpuSpec, start: Constants, row_weights: Sequence[float], *,
    together: bool, num_rounds: int = 40,
) -> Constants:  # fmt: skip
    import numpy as np

    trust = np.array(row_weights)
    groups = TOGETHER if together else {name: (name,) for name in NAMES}
    widths = TOGETHER_WIDTHS if together else WIDTHS
    prior = np.array([(NOISE / widths.get(name, 1.0)) ** 2 for name in groups])
    logs = np.log(np.array([getattr(start, name) for name in NAMES]))
    moves = np.array([[float(name in members) for members in groups.values()] for name in NAMES])
    # A point is the logarithm of a factor for each group of constants.
    at, damping = np.zeros(len(groups)), 1e-2

    def residuals(point: Any) -> Any:
        constants = _constants(logs + moves @ point)
        return np.array([math.log(row.predict(gpu, constants).step_seconds / row.seconds) for row in rows])

    def loss(r: Any, point: Any) -> float:
        size = np.abs(r)
        huber = np.where(size < HUBER, 0.5 * size**2, HUBER * (size - 0.5 * HUBER))
        return float((trust * huber).sum() + 0.5 * (prior * point**2).sum())

    r = residuals(at)
    best = loss(r, at)
    for _ in range(num_rounds):
        jacobian = np.empty((len(rows), len(groups)))
        for index in range(len(groups)):
            moved = at.copy()
            moved[index] += 1e-4
            jacobian[:, index] = (residuals(moved) - r) / 1e-4
        weights = trust * np.minimum(1.0, HUBER / np.maximum(np.abs(r), 1e-12))
        hessian = jacobian.T @ (weights[:, None] * jacobian) + np.diag(prior)
        gradient = jacobian.T @ (weights * r) + prior * at
        before = best
        for _ in range(12):
            step = np.linalg.solve(hessian + damping * np.diag(np.diag(hessian)), gradient)
            trial = at - np.clip(step, -0.5, 0.5)
            trial_r = residuals(trial)
            trial_loss = loss(trial_r, trial)
            if trial_loss < best:
                at, r, best, damping = trial, trial_r, trial_loss, max(damping / 3, 1e-6)
                break
            damping *= 4
        if before - best < 1e-4 * before:
            break
    return _constants(logs + moves @ at)


def _constants(point: Any) -> Constants:
    return Constants(**{name: float(math.exp(x)) for name, x in zip(NAMES, point, strict=True)})


def score(rows: Sequence[Row], gpu: GpuSpec, constants: Constants) -> dict[str, dict[str, float]]:
    """Errors relative to what was measured: of all rows, of launch-bound ones and the others, and of each file."""
    errors: dict[str, list[float]] = {"all": [], "launch-bound": [], "device-bound": []}
    for row in rows:
        time = row.predict(gpu, constants)
        error = time.step_seconds / row.seconds - 1
        errors["all"].append(error)
        errors["launch-bound" if time.bound_by == LAUNCHES else "device-bound"].append(error)
        errors.setdefault(row.file, []).append(error)
    return {name: _summary(found) for name, found in errors.items() if found}


def score_calibrated(
    train: Sequence[Row], test: Sequence[Row], gpu: GpuSpec, constants: Constants
) -> dict[str, dict[str, float]]:
    """Errors as of somebody who has calibrated: each file is a machine, whose rows in `train` move `constants` by the
    factors of `TOGETHER` before its rows in `test` are predicted."""
    errors = []
    for file in sorted({row.file for row in test}):
        known = [row for row in train if row.file == file]
        moved = fit(known, gpu, start=constants, together=True) if known else constants
        errors += [row.predict(gpu, moved).step_seconds / row.seconds - 1 for row in test if row.file == file]
    return {"all": _summary(errors)}


def _summary(errors: list[float]) -> dict[str, float]:
    size = sorted(abs(e) for e in errors)
    return {
        "rows": len(errors),
        "median": round(_quantile(size, 0.5), 4),
        "p90": round(_quantile(size, 0.9), 4),
        "bias": round(_quantile(sorted(errors), 0.5), 4),
    }


def _quantile(ordered: list[float], q: float) -> float:
    place = q * (len(ordered) - 1)
    low = int(place)
    high = min(low + 1, len(ordered) - 1)
    return ordered[low] + (ordered[high] - ordered[low]) * (place - low)


@app.command()
def main(
    records: Annotated[list[Path], typer.Argument(help="Measurement files.")],
    out: Annotated[Path | None, typer.Option(help="Where the constants go.")] = None,
    gpu: Annotated[str, typer.Option(help="The GPU they were measured on.")] = "h200",
    seed: Annotated[int, typer.Option(help="Of the split.")] = 0,
    held_out: Annotated[float, typer.Option(help="Share of the runs to score on.")] = 0.4,
    verbose: Annotated[bool, typer.Option(help="Print every row.")] = False,
) -> None:
    """Fit on some of the measured runs, score on the others."""
    card = gpus.get(gpu)
    rows, left_out = load_rows(records, seed=seed)
    train, test = [r for r in rows if r.place >= held_out], [r for r in rows if r.place < held_out]
    constants = fit(train, card)
    scores = {"fitted": score(train, card, constants), "held_out": score(test, card, constants)}
    scores["calibrated"] = score_calibrated(train, test, card, constants)
    for reason, count in sorted(left_out.items()):
        print(f"left out {count}: {reason}")
    if verbose:
        for row in sorted(rows, key=lambda row: (row.place < held_out, row.id)):
            time = row.predict(card, constants)
            off = exact_percent(time.step_seconds / row.seconds - 1, 1, sign="+")
            print(
                f"{'test ' if row.place < held_out else 'train'} {row.id:32s} {row.seconds * 1e3:9.1f} ms"
                f" predicted {time.step_seconds * 1e3:9.1f} {off:>8s}"
                f" host {time.host_seconds * 1e3:8.1f} device {sum(time.device_seconds.values()) * 1e3:8.1f}"
                f" {time.bound_by}"
            )
    for name in NAMES:
        print(f"{name:20s} {getattr(constants, name):.4g}")
    for part, figures in scores.items():
        for kind, figure in figures.items():
            rows_and_errors = [f"{name} {exact_percent(figure[name], 1)}" for name in ("median", "p90", "bias")]
            print(f"{part:10s} {kind:20s} {figure['rows']:4.0f} rows: {', '.join(rows_and_errors)}")
    if out is not None:
        body = {
            "gpu": card.name,
            "source": f"{len(rows)} measured runs, {len(train)} fitted and {len(test)} held out (split seed {seed}): "
            + ", ".join(path.name for path in records),
            "constants": {name: float(f"{getattr(constants, name):.5g}") for name in NAMES},
            **scores,
        }
        out.write_text(json.dumps(body, indent=2) + "\n", encoding="utf-8")


if __name__ == "__main__":
    app()
