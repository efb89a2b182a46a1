"""The time model: FLOPs against the real models, bytes and kernels against hand counts, the roofline's own laws."""

from __future__ import annotations

import dataclasses
import json
import random
import warnings
from importlib.resources import files
from pathlib import Path

import pytest

import memplan
from memplan import gpus
from memplan.architectures import FAMILIES
from memplan.calibration.choose import cases_for
from memplan.calibration.record import (
    Case,
    DeviceReading,
    Environment,
    Record,
    RecordFile,
    dump_line,
    read_records,
)
from memplan.cli.app import run
from memplan.cli.calibrate import _report
from memplan.dtypes import DType
from memplan.gpus import DetectedGpu, GpuSpec
from memplan.memory.optimizers import OPTIMIZERS
from memplan.model_spec import ModelSpec
from memplan.ops.tensor import AttentionCall
from memplan.timing import fit as fitting
from memplan.timing.flops import AttentionWork, Matmul, attentions, matmuls
from memplan.timing.layers import linears
from memplan.timing.model import LAUNCHES, step_time
from memplan.timing.profile import fit_for, learn, save
from memplan.timing.roofline import Constants, roofline, shipped
from memplan.timing.rows import clean_steps, load_rows
from memplan.timing.update import PASSES
from memplan.timing.work import step_work
from memplan.train_config import TrainConfig
from tests.oracle.configs import CONFIGS

H200 = gpus.get("h200")
TOKENS = 64
# How many rows each expert of a mixture gets depends on the data, and grouped products have no FLOP formula in torch.
DENSE = sorted(name for name in FAMILIES if name in CONFIGS and not ModelSpec.from_hf_config(CONFIGS[name]).is_moe)
DENSE.remove("gemma3n_text")  # counted are neither its streams' products of four by four nor their router's second run
DENSE.remove("qwen3_5_text")  # torch counts no triangular solve, and a depthwise convolution's backward as a full one


def work_of(model: str | ModelSpec, **fields):
    estimate = memplan.estimate(model, **fields)
    return step_work(estimate.program, estimate.model, estimate.config)


def counted_flops(family: str, method: str) -> int:
    """FLOPs of one forward and backward of the real model, as torch counts them."""
    torch = pytest.importorskip("torch")
    transformers = pytest.importorskip("transformers")
    from torch.utils.flop_counter import FlopCounterMode

    torch.set_num_threads(1)
    config = transformers.AutoConfig.for_model(**CONFIGS[family])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        model.train()
        if method == "lora":
            peft = pytest.importorskip("peft")
            model = peft.get_peft_model(model, peft.LoraConfig(r=16, target_modules="all-linear"))
            model.enable_input_require_grads()
        ids = torch.zeros((2, TOKENS), dtype=torch.long)
        counter = FlopCounterMode(display=False)
        with counter:
            model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    return int(counter.get_total_flops())


def played_flops(family: str, method: str) -> int:
    spec = ModelSpec.from_hf_config(CONFIGS[family])
    config = TrainConfig(method=method, stack="torch", seq_len=TOKENS, micro_batch_size=2, attention="eager")
    estimate = memplan.estimate(spec, config)
    layers = linears(estimate.program.weights, spec, config)
    return sum(m.flops for m in matmuls(layers, spec, config)) + sum(
        a.flops for a in attentions(spec, config, estimate.program.attentions)
    )


@pytest.mark.oracle
@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("family", DENSE)
def test_flops_are_those_torch_counts_in_the_real_model(family: str, method: str) -> None:
    real = counted_flops(family, method)
    # torch also counts the outer product of the rotary table
    assert played_flops(family, method) == pytest.approx(real, rel=2e-3)


@pytest.mark.oracle
def test_experts_that_multiply_every_token_are_counted_so() -> None:
    assert played_flops("llama4_text", "full") == pytest.approx(counted_flops("llama4_text", "full"), rel=2e-3)


def test_llama_7b_takes_six_flops_a_parameter_and_token_plus_attention() -> None:
    """PaLM's formula (Chowdhery et al. 2022, appendix B), causal half, less the embedding that is only looked up."""
    work = work_of("llama-7b", method="full", stack="torch", seq_len=2048)
    multiplied = 6_738_415_616 - 32000 * 4096 - 65 * 4096  # published count, less embedding and norms
    attention = 32 * 4096 * 2048 * 2 * (1 + 2.5)  # of 12 * L * h * S: the half, 2.5 times in backward
    assert work.model_flops / work.tokens == pytest.approx(6 * multiplied + attention, rel=1e-9)


def test_lora_leaves_the_base_gradients_out() -> None:
    full = work_of("llama-7b", method="full", stack="torch", seq_len=1024)
    lora = work_of("llama-7b", method="lora", stack="torch", seq_len=1024)
    base = [sum(m.flops for m in work.matmuls if m.part != "adapter") for work in (full, lora)]
    assert base[1] / base[0] == pytest.approx(2 / 3)
    assert not [m for m in lora.matmuls if m.part != "adapter" and m.phase == "dw"]


def test_mixtral_computes_with_its_active_parameters() -> None:
    """13B active of 47B (Jiang et al. 2024, "Mixtral of Experts")."""
    work = work_of("mixtral-8x7b", method="full", stack="torch", seq_len=512)
    forward = sum(m.flops for m in work.matmuls if m.phase == "forward")
    assert forward / (2 * work.tokens) == pytest.approx(12.9e9, rel=0.02)


@pytest.mark.oracle
def test_a_gated_delta_rule_multiplies_as_the_code_of_transformers_does() -> None:
    """torch counts no triangular solve; backward leaves out what the first chunk reads and the last one writes."""
    torch = pytest.importorskip("torch")
    from torch.utils.flop_counter import FlopCounterMode
    from transformers.models.qwen3_next.modeling_qwen3_next import torch_chunk_gated_delta_rule

    spec = ModelSpec.from_hf_config(CONFIGS["qwen3_next"])
    config = TrainConfig(method="full", stack="torch", micro_batch_size=2, seq_len=64 * 100)
    rows = 2 * config.seq_len * spec.linear_num_value_heads
    key, value = spec.linear_key_head_dim, spec.linear_value_head_dim
    solves = rows * 64 * (key + value)

    def made(*widths: int) -> torch.Tensor:
        shape = (2, config.seq_len, spec.linear_num_value_heads, *widths)
        return torch.empty(shape, device="meta", requires_grad=True)

    counted = []
    with FlopCounterMode(display=False) as counter:
        out, _ = torch_chunk_gated_delta_rule(
            made(key), made(key), made(value), made(), made(), use_qk_l2norm_in_kernel=True
        )
        counted.append(counter.get_total_flops())
        out.sum().backward()
        counted.append(counter.get_total_flops() - counted[0])
    forward, backward = (w.flops for w in attentions(spec, config, [None]))
    assert forward == counted[0] + solves
    assert backward == pytest.approx(counted[1] + solves, rel=0.02)


def test_checkpointing_adds_one_forward_of_the_layers() -> None:
    plain = work_of("llama-7b", method="lora", stack="torch", seq_len=512)
    saved = work_of("llama-7b", method="lora", stack="torch", seq_len=512, gradient_checkpointing=True)
    in_layers = sum(m.flops for m in plain.matmuls if m.phase == "forward" and m.part != "head")
    assert sum(m.flops for m in saved.matmuls if m.phase == "recompute") == in_layers
    assert saved.model_flops == plain.model_flops
    assert saved.hardware_flops > plain.hardware_flops
    assert saved.backward.kernels > plain.backward.kernels + plain.forward.kernels * 0.8


FALCON = {"model_type": "falcon", "hidden_size": 4544, "num_hidden_layers": 2, "num_attention_heads": 71}


@pytest.mark.parametrize(
    ("model", "fields", "kernel", "dtype"),
    [
        ("llama-7b", {}, "cudnn", "bf16"),
        ("llama-7b", {"attention": "eager"}, "products", "bf16"),
        ("llama-7b", {"weight_dtype": "fp32", "autocast": False}, "efficient", "fp32"),
        # sdpa that no fused kernel takes: one key head for all (falcon), grouped heads in fp32 (k-bit preparation)
        (FALCON, {}, "products", "fp32"),
        (FALCON, {"attention": "eager"}, "products", "bf16"),
        ("llama-3-8b", {"method": "qlora", "kbit_prep": True, "autocast": False}, "products", "fp32"),
        # asked for sdpa, these have none
        ("bloom-560m", {}, "products", "bf16"),
    ],
)
def test_attention_is_timed_as_the_kernel_that_runs(model: str | dict, fields: dict, kernel: str, dtype: str) -> None:
    spec = model if isinstance(model, str) else ModelSpec.from_hf_config(model)
    work = work_of(spec, **{"method": "lora", "stack": "torch", "seq_len": 512, **fields})
    assert {(a.call.kernel, a.call.dtype.name) for a in work.attentions} == {(kernel, dtype)}
    forward, backward = (sum(a.flops for a in work.attentions if a.phase == p) for p in ("forward", "backward"))
    assert backward == forward * (2 if kernel == "products" else 2.5)


def test_products_in_fp32_run_at_the_fp32_peak() -> None:
    line = roofline(H200, DType.bf16, Constants())
    half, full = (AttentionCall("products", dtype, masked=True) for dtype in (DType.bf16, DType.fp32))
    work = AttentionWork(10**12, half, 1, 1024, "forward")
    assert line.attention(dataclasses.replace(work, call=full)) > 10 * line.attention(work)


def test_the_output_head_goes_with_the_loss() -> None:
    """Chunked: logits made again in backward; Liger: gradients before backward; the layers' products elsewhere."""
    for loss, of_head in (
        ("full", {"loss": 1, "loss_backward": 2}),
        ("chunked", {"loss": 1, "loss_backward": 3}),
        ("liger", {"loss": 3}),
    ):
        work = work_of("llama-7b", method="full", stack="torch", seq_len=512, loss=loss)
        heads = [m for m in work.matmuls if m.part == "head"]
        assert {piece: sum(m.piece == piece for m in heads) for piece in of_head} == of_head
        assert {m.piece for m in work.matmuls if m.part == "base"} == {"forward", "backward"}


def test_the_host_waits_for_the_loss_and_the_device_for_the_layers() -> None:
    """A step of many short kernels and a long loss takes longer than either side alone."""
    time = step_time(memplan.estimate("qwen3-0.6b", method="lora", stack="torch", micro_batch_size=6), H200)
    assert time.step_seconds > 1.1 * max(time.host_seconds, sum(time.device_seconds.values()))


def test_four_bit_weights_are_made_whole_in_every_pass() -> None:
    plain = work_of("llama-7b", method="qlora", stack="torch", seq_len=512).dequantisation
    saved = work_of("llama-7b", method="qlora", stack="torch", seq_len=512, gradient_checkpointing=True).dequantisation
    params_in_layers = 32 * (4 * 4096**2 + 3 * 4096 * 11008)
    assert plain.written_bytes == 2 * 2 * params_in_layers
    assert saved.written_bytes == 3 * 2 * params_in_layers
    assert (plain.calls, saved.calls) == (2 * 224, 3 * 224)
    assert plain.read_bytes == pytest.approx(2 * params_in_layers * (0.5 + 1 / 64), rel=2e-3)


def test_every_optimizer_has_its_passes() -> None:
    assert set(PASSES) == set(OPTIMIZERS)


def test_fused_adamw_moves_seven_copies_of_the_parameters() -> None:
    work = work_of("llama-7b", method="full", stack="torch", optimizer="adamw_torch_fused")
    assert work.update_bytes == 7 * 2 * 6_738_415_616
    assert work.clip_bytes == 3 * 2 * 6_738_415_616
    assert work_of("llama-7b", method="full", stack="torch", max_grad_norm=0.0).clip_bytes == 0


def test_elementwise_kernels_write_a_share_of_what_the_program_allocates() -> None:
    """Written bytes and kernels are the tapes': what matrix products write is theirs."""
    estimate = memplan.estimate("llama-7b", method="lora", stack="torch", seq_len=512)
    work = step_work(estimate.program, estimate.model, estimate.config)
    plays = [p for p in estimate.program.plays if p.step == 1 and p.phase in ("forward", "loss")]
    sizes = [size for play in plays for _, size in play.tape if size]
    products = sum(m.out_bytes for m in work.matmuls if m.phase == "forward")
    both = work.forward + work.loss
    assert both.kernels == len(sizes)
    assert both.written_bytes == sum(sizes) - products > 0
    assert work.loss.written_bytes > 8 * work.tokens * 32000  # fp32 logits, and as many bytes again
    assert 0 < work.loss.kernels < work.forward.kernels / 32


def test_accumulated_steps_repeat_the_second() -> None:
    two = memplan.estimate("llama-7b", method="lora", gradient_accumulation_steps=2)
    five = memplan.estimate("llama-7b", method="lora", gradient_accumulation_steps=5)
    shown = step_work(two.program, two.model, two.config, num_micro_steps=5)
    assert shown == step_work(five.program, five.model, five.config)
    assert 0.999 * five.tensor_bytes < two.tensor_bytes <= five.tensor_bytes
    assert step_time(two, H200, num_micro_steps=5).step_seconds == step_time(five, H200).step_seconds


def test_no_step_is_faster_than_the_peaks_allow() -> None:
    random_choice = random.Random(7)
    for _ in range(12):
        fields = {
            "method": random_choice.choice(["full", "lora", "qlora"]),
            "stack": random_choice.choice(["torch", "trl"]),
            "seq_len": random_choice.choice([256, 1024, 4096]),
            "micro_batch_size": random_choice.choice([1, 4]),
        }
        time = step_time(memplan.estimate("qwen3-0.6b", **fields), H200)
        assert 0 < time.floor_seconds < time.step_seconds, fields
        assert 0 < time.mfu < 1, fields
        assert time.step_seconds >= max(time.host_seconds, sum(time.device_seconds.values())) * 0.999, fields


def test_more_tokens_take_longer_and_are_used_better() -> None:
    times = [
        step_time(memplan.estimate("llama-7b", method="lora", micro_batch_size=size), H200) for size in (1, 2, 4, 8)
    ]
    assert [t.step_seconds for t in times] == sorted(t.step_seconds for t in times)
    assert [t.tokens_per_second for t in times] == sorted(t.tokens_per_second for t in times)


def test_a_small_model_is_bound_by_its_launches_and_a_large_batch_is_not() -> None:
    assert step_time(memplan.estimate("qwen3-0.6b", method="lora"), H200).bound_by == LAUNCHES
    large = memplan.estimate("llama-7b", method="full", stack="torch", micro_batch_size=8, seq_len=2048)
    assert step_time(large, H200).bound_by != LAUNCHES


def test_small_sides_of_a_product_are_inefficient() -> None:
    line = roofline(H200, DType.bf16, Constants())

    def rate(rows: int, cols: int, depth: int) -> float:
        product = Matmul(rows, cols, depth, DType.bf16, 1, "forward", "base")
        return product.flops / line.matmul(product)

    assert rate(8192, 8192, 8192) > 2 * rate(64, 4096, 4096)
    assert rate(8192, 8192, 8192) < H200.bf16_flops
    assert rate(4096, 16, 4096) < rate(4096, 4096, 4096) / 5
    fp32 = Matmul(4096, 4096, 4096, DType.fp32, 1, "forward", "base")
    assert line.matmul(fp32) > 5 * line.matmul(dataclasses.replace(fp32, dtype=DType.bf16))


@pytest.mark.parametrize("name", ["v100-32gb", "t4"])
def test_a_gpu_without_bf16_cannot_run_it(name: str) -> None:
    with pytest.raises(memplan.MemplanError, match="no bf16"):
        step_time(memplan.estimate("qwen3-0.6b"), gpus.get(name))


def test_a_gpu_of_unknown_peaks_has_no_time() -> None:
    with pytest.raises(memplan.MemplanError, match="peaks of `24GiB`"):
        step_time(memplan.estimate("qwen3-0.6b"), gpus.get("24GiB"))


def test_shipped_constants_are_plausible_and_say_where_they_come_from() -> None:
    fit = shipped()
    assert fit.gpu == "h200"
    assert "measured runs" in fit.source
    values = dataclasses.asdict(fit.constants)
    assert all(value > 0 for value in values.values())
    for name in ("matmul", "matmul_fp32", "flash", "efficient", "attention_fp32", "stream", "dequantise", "blockwise"):
        assert values[name] <= 1.05, name  # shares of a peak; a datasheet's can be passed by a little
    assert {"rows", "median", "p90", "bias"} <= set(fit.held_out)


def test_real_models_take_about_as_long_as_predicted() -> None:
    """The shipped constants over the measured runs of published models; the data file tells the errors held out."""
    told = json.loads(files("memplan").joinpath("data/timing_h200.json").read_text(encoding="utf-8"))
    shipped_records = Path(str(files("memplan").joinpath("calibration/records")))
    rows, _ = load_rows([shipped_records / "h200-real.jsonl"], seed=0)
    constants = shipped().constants
    found = fitting.score([row for row in rows if row.place < 0.4], H200, constants)["h200-real"]
    assert found == pytest.approx(told["held_out"]["h200-real"], abs=0.02)
    everything = fitting.score(rows, H200, constants)["all"]
    assert everything["rows"] >= 20
    assert everything["median"] <= 0.10
    assert everything["p90"] <= 0.25
    assert abs(everything["bias"]) <= 0.05
    held_out = told["held_out"]["all"]
    assert held_out["median"] <= 0.10
    assert held_out["p90"] <= 0.27
    assert abs(held_out["bias"]) <= 0.05


def write_records(path: Path, constants: Constants, card: GpuSpec = H200) -> int:
    """A measurement file of steps on `card` that take exactly what `constants` say; returns its number of runs."""
    lines = []
    config = {"model_type": "llama", "intermediate_size": 2816, "num_attention_heads": 16, "vocab_size": 8000}
    for width in (512, 1024, 2048):
        for method in ("full", "lora", "qlora"):
            for tokens in (256, 4096):
                case = Case(
                    id=f"w{width}-{method}-{tokens}",
                    hf_config={**config, "hidden_size": width, "num_hidden_layers": 4},
                    config={"method": method, "stack": "torch", "seq_len": tokens, "micro_batch_size": 4},
                )
                estimate = memplan.estimate(ModelSpec.from_hf_config(case.hf_config), case.train_config())
                seconds = step_time(estimate, card, constants).step_seconds
                lines.append(dump_line(Record(case=case, status="ok", step_seconds=(9.0, seconds * 1.2, seconds))))
    path.write_text("\n".join(lines), encoding="utf-8")
    return len(lines)


def test_a_fit_recovers_the_constants_that_made_its_rows(tmp_path: Path) -> None:
    truth = dataclasses.replace(Constants(), launch_forward=40e-6, traffic=3.2, matmul=0.6, per_step=6e-3)
    number = write_records(tmp_path / "made.jsonl", truth)
    rows, left_out = load_rows([tmp_path / "made.jsonl"], seed=0)
    assert (len(rows), left_out) == (number, {})
    train, test = [row for row in rows if row.place >= 0.4], [row for row in rows if row.place < 0.4]
    assert train
    assert test
    before = fitting.score(rows, H200, Constants())["all"]
    after = fitting.score(test, H200, fitting.fit(train, H200))["all"]
    assert before["median"] > 0.1
    assert after["median"] < 0.04
    assert abs(after["bias"]) < 0.04


def test_the_split_is_by_run_and_seed(tmp_path: Path) -> None:
    write_records(tmp_path / "a.jsonl", Constants())
    text = (tmp_path / "a.jsonl").read_text(encoding="utf-8")
    (tmp_path / "b.jsonl").write_text(text.replace('"id": "w', '"id": "again-w'), encoding="utf-8")
    rows, _ = load_rows([tmp_path / "a.jsonl", tmp_path / "b.jsonl"], seed=0)
    places = {row.id.removeprefix("again-"): row.place for row in rows}
    assert all(places[row.id.removeprefix("again-")] == row.place for row in rows)
    assert len(set(places.values())) > len(places) / 2
    other, _ = load_rows([tmp_path / "a.jsonl"], seed=1)
    assert [row.place for row in other] != [row.place for row in rows[: len(other)]]


def test_only_clean_steps_count() -> None:
    case = Case(id="x", hf_config={"model_type": "llama"}, config={"method": "lora"}, snapshot=True)
    record = Record(case=case, status="ok", step_seconds=(9.0, 2.0, 3.0))
    assert clean_steps(record) == [3.0]  # the second was traced
    assert clean_steps(record.model_copy(update={"case": case.model_copy(update={"snapshot": False})})) == [2.0, 3.0]
    assert clean_steps(record.model_copy(update={"case": case.model_copy(update={"snapshot_step": 0})})) == []


def test_a_calibration_of_ones_own_card_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MEMPLAN_PROFILES", str(tmp_path / "profiles"))
    card = gpus.get("rtx-4090")
    made = memplan.estimate("qwen3-0.6b", method="lora", micro_batch_size=4)
    before = step_time(made, card).step_seconds
    slow = dataclasses.replace(shipped().constants, launch_forward=90e-6, traffic=6.0)
    write_records(tmp_path / "own.jsonl", slow, card)
    header = Environment(gpu="NVIDIA GeForce RTX 4090", gpu_total_bytes=card.memory_bytes, date="2026-11-22")
    records = read_records(tmp_path / "own.jsonl").records
    learnt = learn(RecordFile(environment=header, records=records))
    assert learnt.gpu == "rtx-4090"
    assert learnt.held_out["median"] < 0.1
    path = save(learnt, header.gpu)
    assert path.parent == tmp_path / "profiles"
    assert fit_for(card) == learnt
    assert fit_for(H200) == shipped()
    after = step_time(made, card).step_seconds
    truth = step_time(made, card, slow).step_seconds
    assert abs(after / truth - 1) < abs(before / truth - 1)
    told = memplan.cost("qwen3-0.6b", gpu="rtx-4090", num_tokens=10**6, price=1.0, method="lora")
    assert told.measured_on_this_gpu
    assert any(header.date in line for line in told.assumptions)
    path.write_text('{"constants": {"matmul": -1}}', encoding="utf-8")
    with pytest.raises(memplan.MemplanError, match="cannot be read"):
        fit_for(card)


@pytest.mark.parametrize(
    ("product", "num_runs", "says"),
    [
        ("NVIDIA GeForce RTX 4090", 3, "too few runs .* 3, "),
        ("Voodoo 5", 9, "peaks of `Voodoo 5`"),
        (None, 9, "which GPU"),
    ],
)
def test_what_cannot_be_learnt_is_said(tmp_path: Path, product: str | None, num_runs: int, says: str) -> None:
    write_records(tmp_path / "own.jsonl", Constants())
    records = read_records(tmp_path / "own.jsonl").records[:num_runs]
    header = product and Environment(gpu=product, gpu_total_bytes=24 * 2**30, date="2026-11-22")
    with pytest.raises(memplan.MemplanError, match=says):
        learn(RecordFile(environment=header or None, records=records))


def calibration(path: Path, constants: Constants, card: GpuSpec) -> None:
    """What `memplan calibrate --quick` leaves behind on `card`, whose steps take what `constants` say."""
    detected = DetectedGpu(card, 0, card.products[0], card.memory_bytes, card.memory_bytes, "580.1")
    header = Environment(gpu=card.products[0], gpu_total_bytes=card.memory_bytes, date="2026-11-22")
    lines = [dump_line(header)]
    used = {"start": 0, "context": 500 * 2**20}
    device = {
        name: DeviceReading(used_bytes=taken, reserved_bytes=0, total_bytes=card.memory_bytes)
        for name, taken in used.items()
    }
    for case in cases_for(detected, None, {}, quick=True, full=False, seed=0, share=0.92):
        estimate = memplan.estimate(ModelSpec.from_hf_config(case.hf_config), case.train_config(), gpu=card.name)
        seconds = step_time(estimate, card, constants).step_seconds
        sizes = {
            "peak_allocated_bytes": estimate.allocated_bytes,
            "peak_reserved_bytes": estimate.reserved_bytes,
            "process_bytes": estimate.process_bytes,
        }
        lines.append(dump_line(Record(case=case, status="ok", step_seconds=(9.0, seconds), device=device, **sizes)))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def test_the_command_calibrate_keeps_the_time_of_the_card_it_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """All runs are in the file already, so that nothing is left to measure; cost and plan then say other hours."""
    monkeypatch.setenv("MEMPLAN_PROFILES", str(tmp_path / "profiles"))
    card = gpus.get("rtx-4090")
    slow = dataclasses.replace(
        shipped().constants, launch_forward=90e-6, launch_backward=60e-6, launch_recompute=120e-6
    )
    calibration(tmp_path / "own.jsonl", slow, card)
    detected = DetectedGpu(card, 0, card.products[0], card.memory_bytes, card.memory_bytes, "580.1")
    monkeypatch.setattr(gpus, "detect", lambda: detected)
    question = ["cost", "qwen3-0.6b", "--gpu", "rtx-4090", "--num-tokens", "10M", "--price", "1", "--json"]
    of_plan = [
        "plan",
        "qwen3-0.6b",
        "--gpus",
        "rtx-4090",
        "--num-tokens",
        "10M",
        "--price",
        "1",
        "--micro-batch-size",
        "1",
    ]

    def asked(arguments: list[str]) -> dict:
        assert run(arguments) == 0
        return json.loads(capsys.readouterr().out)

    before, planned_before = asked(question), asked([*of_plan, "--json"])["front"][0]
    assert not before["measured_on_this_gpu"]
    assert run(["calibrate", "--quick", "--out", str(tmp_path / "own.jsonl")]) == 0
    assert "time constants of this GPU" in capsys.readouterr().err
    assert len(list((tmp_path / "profiles").iterdir())) == 2
    after, planned = asked(question), asked([*of_plan, "--json"])["front"][0]
    assert after["measured_on_this_gpu"]
    assert planned["measured_on_this_gpu"]
    truth = step_time(memplan.estimate("qwen3-0.6b", gpu="rtx-4090"), card, slow).step_seconds
    assert truth > 1.5 * before["step_seconds"]
    assert after["step_seconds"] == pytest.approx(truth, rel=0.15)
    assert planned["hours"] > planned_before["hours"]


def test_too_small_a_calibration_leaves_the_time_constants_and_says_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("MEMPLAN_PROFILES", str(tmp_path / "profiles"))
    calibration(tmp_path / "own.jsonl", Constants(), gpus.get("rtx-4090"))
    lines = (tmp_path / "own.jsonl").read_text(encoding="utf-8").splitlines()
    (tmp_path / "few.jsonl").write_text("\n".join(lines[:4]), encoding="utf-8")
    _report(tmp_path / "few.jsonl")
    assert "time constants stay as they were: too few runs with a step to go by: 3" in " ".join(
        capsys.readouterr().err.split()
    )
    assert fit_for(gpus.get("rtx-4090")) == shipped()
