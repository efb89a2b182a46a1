"""Components at the allocated peak, summed from allocation traces of an H200, against what memplan predicts.

The runs whose whole history was traced are told apart to the byte; in the other the first step has no stacks.
"""

from __future__ import annotations

import gzip
import json
from functools import cache
from pathlib import Path

import pytest

from memplan.calibration.components import UNTRACED, traced_peak
from memplan.calibration.trace import Event, Part, read_trace, write_trace
from memplan.errors import MemplanError
from memplan.traced_runs import TracedRun, traced_runs, traces_of
from memplan.validation import validate

RECORDS = Path(__file__).parent / "data" / "traced" / "h200.jsonl"
WHOLE = ("run-llama-lora-ckpt", "run-llama-qlora", "run-llama-full-8bit")


@cache
def traced() -> dict[str, TracedRun]:
    return {one.run.record.case.id: one for one in traced_runs(validate([RECORDS]), [RECORDS])}


def test_every_run_has_its_trace() -> None:
    assert set(traced()) == {*WHOLE, "trl-full"}


@pytest.mark.parametrize("name", WHOLE)
def test_each_component_is_the_traced_one(name: str) -> None:
    one = traced()[name]
    assert one.peak.phase == one.run.estimate.peak_phase == "backward"
    assert {row.component: row.predicted_bytes for row in one.rows} == {
        row.component: row.measured_bytes for row in one.rows
    }
    assert sum(row.measured_bytes for row in one.rows) == one.run.record.peak_allocated_bytes


def test_measured_components_agree_with_what_the_run_itself_counted() -> None:
    """Neither side of these equations is memplan's: they hold the rules, not the prediction."""
    for name in WHOLE:
        one = traced()[name]
        assert one.run.record.optimizer_state_bytes is not None
        states = one.peak.components["optimizer_states"]
        assert 0 <= states - one.run.record.optimizer_state_bytes <= 512 * states // 1000
        # one batch of int64 input_ids and labels
        config = one.run.estimate.config
        assert one.peak.components["inputs"] == 2 * 8 * config.micro_batch_size * config.seq_len
    lora = traced()["run-llama-lora-ckpt"]
    assert lora.run.record.num_trainable_params is not None
    assert lora.peak.components["adapters"] == 4 * lora.run.record.num_trainable_params


def test_what_the_trace_did_not_see_is_one_row() -> None:
    one = traced()["trl-full"]
    rows = {row.component: row for row in one.rows}
    assert {"optimizer_states", "workspaces", "inputs"}.isdisjoint(rows)
    # the running loss, the last loss and the last norm, of 512 bytes each, were made by the step before
    assert rows[UNTRACED].difference_bytes == -3 * 512
    assert rows["weights"].difference_bytes == rows["gradients"].difference_bytes == 0
    assert rows["activations"].difference_bytes == 0


STACKS = [
    ["lora/layer.py:1 update_layer"],
    ["llama/modeling_llama.py:1 forward", "transformers/modeling_layers.py:1 __call__"],
    ["MmBackward0"],
    ["optim/adam.py:1 step"],
]
MARKS = [[0, 0, "load", 0, 0], [0, 0, "prepare", 1, 0], [1, 0, "forward", 2, 0], [1, 0, "backward", 4, 1],
         [1, 0, "optimizer", 6, 2], [1, 0, "zero", 8, 4]]  # fmt: skip


def part(*changed: Event) -> Part:
    events = [
        Event("a", 0x1000, 1000, 0, -1),  # a weight
        Event("a", 0x2000, 512, 1, 0),  # an adapter
        Event("a", 0x3000, 700, 2, 1),  # saved
        Event("a", 0x4000, 100, 2, 1),  # a temporary of forward
        Event("f", 0x4000, 100, 2, -1),
        Event("a", 0x5000, 512, 3, 2),  # a gradient
        Event("a", 0x6000, 512, 3, 2),  # a temporary of backward
        Event("f", 0x3000, 700, 3, -1),
        Event("f", 0x6000, 512, 3, -1),
        Event("a", 0x7000, 512, 4, 3),  # a state
        Event("a", 0x8000, 512, 4, 3),  # a temporary
        Event("f", 0x8000, 512, 4, -1),
        Event("f", 0x5000, 512, 5, -1),
    ]
    return Part("run", MARKS, [], STACKS, [*events, *changed])


def test_blocks_are_told_apart_by_when_they_die() -> None:
    at_backward = traced_peak([part()])
    assert (at_backward.num_bytes, at_backward.step, at_backward.phase) == (3584, 1, "backward")
    assert at_backward.components == {
        "weights": 1024, "adapters": 512, "activations": 1024, "gradients": 512, "temporaries": 512
    }  # fmt: skip
    later = traced_peak([part(Event("a", 0x9000, 9000, 4, 3))])
    assert later.components == {"weights": 1024, "adapters": 512, "optimizer_states": 512 + 9216}


def test_a_trace_that_is_not_whole_is_refused(tmp_path: Path) -> None:
    cut = Part("run", MARKS, [], STACKS, part().events[:4], num_dropped=9)
    with pytest.raises(MemplanError, match="cut short"):
        traced_peak([cut])
    with pytest.raises(MemplanError, match="not seen allocated"):
        traced_peak([part(Event("f", 0xA000, 1, 5, -1))])

    records = tmp_path / "mine.jsonl"
    records.write_text(RECORDS.read_text())
    folder = traces_of(records)
    folder.mkdir()
    broken = folder / "trl-full.jsonl.gz"
    for content in (b"no gzip", gzip.compress(b'{"part": "run"}\n'), gzip.compress(json.dumps([1]).encode())):
        broken.write_bytes(content)
        with pytest.raises(MemplanError, match=r"trl-full\.jsonl\.gz"):
            traced_runs(validate([records]), [records])
    write_trace(broken, read_trace(traces_of(RECORDS) / "trl-full.jsonl.gz"))
    assert [one.run.record.case.id for one in traced_runs(validate([records]), [records])] == ["trl-full"]
