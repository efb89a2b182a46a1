"""What `fit` suggests, tried as its reader would: added to the command line, it makes the run fit, as predicted."""

from __future__ import annotations

import json

import pytest

from memplan.cli import app
from memplan.fit import Fitter

RUNS = (
    "llama-7b --gpu rtx-4080 --method lora --rank 256 -b 4",
    "llama-7b --gpu rtx-4090 --method full",
    "llama-7b --gpu a100-80gb --method full --autocast",
    "llama-7b --gpu a100-80gb --method full --weight-dtype fp32",
    "llama-7b --gpu a100-80gb --method full --optimizer adamw_torch --stack torch -b 16",
    "llama-7b --gpu rtx-4090 --stack torch --attention eager --seq-len 2048",
    "llama-7b --gpu rtx-4090 -b 8 --no-gradient-checkpointing",
    "llama-3.1-8b --gpu rtx-4090 --stack trainer --seq-len 4096 -b 4",
    "llama-3.1-8b --gpu rtx-4090 --stack torch --loss full --gradient-checkpointing -b 6",
    "llama-3.1-8b --gpu a100-80gb --stack trainer --method full --optimizer adamw_bnb_8bit",
    "llama-2-70b --gpu h200 --method lora -b 16",
    "llama-2-70b --gpu rtx-4090 --method qlora",
    "gpt2 --gpu 3GiB --stack torch --method full --seq-len 1024 -b 8",
    "gpt2 --gpu 2.2GiB --stack trainer --target-modules c_attn -b 16",
    "opt-1.3b --gpu 8GiB --stack trainer --method full",
    "pythia-1b --gpu 8GiB --stack torch --method full --weight-dtype fp32 --no-autocast",
    "qwen3-8b --gpu rtx-4080 --use-dora --lora-dropout 0.1",
    "qwen3-30b-a3b --gpu a100-80gb --method lora -b 32",
    "gemma-2-2b --gpu 8GiB --seq-len 8192 -b 2 --gradient-accumulation-steps 4",
    "phi-3-mini-4k --gpu 8GiB --stack trl --method lora --modules-to-save lm_head",
    "falcon-7b --gpu rtx-4080 --method lora --seq-len 2048 --padding -b 4",
    "mpt-7b --gpu rtx-4090 --stack torch --reentrant --gradient-checkpointing -b 8",
)


def fit_json(capsys: pytest.CaptureFixture[str], command: str) -> tuple[int, dict[str, object]]:
    status = app.run(["fit", *command.split(), "--json"])
    out, err = capsys.readouterr()
    assert status in (0, 1), err
    return status, json.loads(out)


@pytest.mark.parametrize("command", RUNS)
def test_each_suggestion_does_what_it_says(
    command: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fitter, "largest", lambda *_: 0)  # how far it goes is not asked here
    _, document = fit_json(capsys, command)
    assert document["verdict"] != "fits", "choose a run that needs a suggestion"
    suggestions = document["suggestions"]
    assert isinstance(suggestions, list)
    for suggestion in suggestions:
        added = suggestion["flags"].split()
        switches = [word for word in added if word.startswith("--")]
        turned = {w.replace("--no-", "--") if w.startswith("--no-") else w.replace("--", "--no-") for w in switches}
        assert not turned & set(command.split())
        for option in (word for word in suggestion["in_place_of"].split() if word.startswith("--")):
            assert option in command.replace("-b ", "--micro-batch-size ")
        status, changed = fit_json(capsys, f"{command} {suggestion['flags']}")
        assert (status, changed["verdict"]) == (0, "fits"), suggestion
        assert changed["process_bytes"] == suggestion["process_bytes"]


def test_most_of_these_runs_have_a_way_out(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Else the test above would pass by silence."""
    monkeypatch.setattr(Fitter, "largest", lambda *_: 0)
    found = [fit_json(capsys, command)[1]["suggestions"] for command in RUNS[:8]]
    assert sum(map(bool, found)) >= 6
