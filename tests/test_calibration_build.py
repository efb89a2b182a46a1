"""The measured model is the one that loading would give, and every stack runs its steps. CPU, tiny sizes."""

import pytest

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
pytest.importorskip("peft")
pytest.importorskip("bitsandbytes")

from memplan.calibration.build import build_model  # noqa: E402
from memplan.calibration.optimizers import NAMES, make_optimizer, state_bytes  # noqa: E402
from memplan.calibration.record import Case  # noqa: E402
from memplan.calibration.run import count_params, run_case  # noqa: E402
from memplan.errors import UnknownNameError  # noqa: E402
from memplan.train_config import TrainConfig  # noqa: E402

pytestmark = [pytest.mark.oracle, pytest.mark.filterwarnings("default")]  # the libraries warn freely
CPU = torch.device("cpu")
SIZES = {
    "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 300,
}  # fmt: skip
MODELS = {
    "llama": {"model_type": "llama", **SIZES},
    "qwen2-biases": {"model_type": "qwen2", **SIZES},
    "gemma2-tied-and-scaled": {"model_type": "gemma2", **SIZES, "head_dim": 16},
    "gpt2-conv1d": {"model_type": "gpt2", "n_embd": 64, "n_head": 4, "n_layer": 2, "vocab_size": 300},
    "qwen3_moe-experts": {
        "model_type": "qwen3_moe", **SIZES, "head_dim": 16, "num_experts": 4, "num_experts_per_tok": 2,
        "moe_intermediate_size": 32,
    },
}  # fmt: skip
BUILDS = {
    "full": {"method": "full"},
    "fp16": {"method": "lora", "weight_dtype": "fp16"},
    "nf4": {"method": "qlora"},
    "nf4-single": {"method": "qlora", "double_quant": False},
    "int8": {"method": "qlora", "quant_type": "int8"},
}


def case(model="llama", **config):
    said = {"stack": "torch", "seq_len": 16, "micro_batch_size": 2, **config}
    return Case(id="case", hf_config=MODELS[model], config=said, num_steps=2)


def loaded(model, config, folder):
    """The same architecture as a user gets it: saved, then loaded with transformers' own loader."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}[config.weight_dtype]
    hf_config = transformers.AutoConfig.for_model(**MODELS[model])
    transformers.AutoModelForCausalLM.from_config(hf_config, dtype=dtype).save_pretrained(folder)
    quantization = None
    if config.method == "qlora" and config.quant_type == "int8":
        quantization = transformers.BitsAndBytesConfig(load_in_8bit=True)
    elif config.method == "qlora":
        quantization = transformers.BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype,
            bnb_4bit_use_double_quant=config.double_quant,
        )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=dtype, quantization_config=quantization, device_map="cpu"
    )


def description(model):
    found = {name: str(getattr(model, name, None)) for name in ("is_loaded_in_4bit", "is_loaded_in_8bit")}
    for name, parameter in model.named_parameters():
        found[name] = [type(parameter).__name__, parameter.shape, parameter.dtype, parameter.requires_grad]
        if (state := getattr(parameter, "quant_state", None)) is not None:
            found[name] += [
                state.shape,
                state.dtype,
                state.quant_type,
                state.absmax.dtype,
                state.absmax.shape,
            ]
        if getattr(parameter, "SCB", None) is not None:
            found[name] += [parameter.SCB.shape]
    for name, module in model.named_modules():
        found[f"{name} module"] = [type(module).__name__, getattr(module, "compute_dtype", None)]
        found[f"{name} kept out of checkpoints"] = sorted(module._non_persistent_buffers_set)
    return found


@pytest.mark.parametrize("build", BUILDS)
@pytest.mark.parametrize("model", MODELS)
def test_the_model_built_is_the_model_loaded(model, build, tmp_path):
    config = case(model, **BUILDS[build]).train_config()
    ours, theirs = build_model(case(model, **BUILDS[build]), config, CPU), loaded(model, config, tmp_path)
    assert description(ours) == description(theirs)
    assert [name for name, _ in ours.named_buffers()] == [name for name, _ in theirs.named_buffers()]
    for (name, buffer), (_, wanted) in zip(ours.named_buffers(), theirs.named_buffers(), strict=True):
        assert torch.equal(buffer, wanted), name
    assert count_params(ours) == theirs.num_parameters()


@pytest.mark.parametrize(
    "config",
    [
        {"method": "full", "optimizer": "sgd_momentum", "max_grad_norm": 0.0},
        {"method": "lora", "padding": True, "gradient_accumulation_steps": 2, "lora_dropout": 0.1},
        {
            "method": "lora",
            "gradient_checkpointing": True,
            "reentrant": True,
            "modules_to_save": ("lm_head",),
        },
        {"method": "qlora", "gradient_checkpointing": True, "autocast": True, "adapter_dtype": "bf16"},
        {"method": "qlora", "stack": "trainer", "padding": True, "gradient_accumulation_steps": 2},
        {"method": "full", "stack": "trainer", "optimizer": "adafactor"},
    ],
)
def test_a_run_leaves_a_record_with_its_phases(config):
    record = run_case(case(**config), device="cpu")
    assert record.status == "ok", record.error
    said = record.case.train_config()
    micro = said.gradient_accumulation_steps
    wanted = ["forward", "backward"] * micro + ["clip"] * (said.max_grad_norm > 0) + ["optimizer", "zero"]
    assert [row.phase for row in record.phases] == ["load", "prepare"] + wanted * 2
    assert len(record.step_seconds) == 2
    assert record.num_params == count_params(build_model(record.case, said, CPU))
    if said.method == "full":
        assert record.num_trainable_params == record.num_params
    elif not said.modules_to_save:
        widths = [(64, 64), (64, 32), (64, 32), (64, 64), (64, 96), (64, 96), (96, 64)]
        assert record.num_trainable_params == 2 * 16 * sum(a + b for a, b in widths)


def test_an_error_of_the_libraries_is_a_record():
    record = run_case(case(method="lora", target_modules=("no_such",)), device="cpu")
    assert record.status == "error"
    assert "no_such" in (record.error or "")
    assert [row.phase for row in record.phases] == ["load"]


@pytest.mark.parametrize("name", [n for n in NAMES if "paged" not in n and "ademamix" not in n])
def test_an_optimizer_steps_and_its_state_is_counted_once(name):
    weight = torch.nn.Parameter(torch.ones(64, 128))
    optimizer = make_optimizer(name, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = state_bytes(optimizer, CPU)
    wanted = {
        "adamw_torch": 64 * 128 * 8 + 4,
        "sgd": 0,
        "sgd_momentum": 64 * 128 * 4,
        "adafactor": (64 + 128) * 4 + 4,  # a row, a column and the RMS
    }
    if name in wanted:
        assert kept == wanted[name]
    assert (kept > 0) == (name != "sgd")


def test_an_unknown_optimizer_is_a_users_error():
    with pytest.raises(UnknownNameError, match="unknown optimizer `adamw_troch`"):
        make_optimizer("adamw_troch", [torch.zeros(1)])


def test_the_default_attention_of_a_family_without_sdpa_is_eager():
    config = TrainConfig(method="full", stack="torch")
    gptj = Case(
        id="gptj", config={"method": "full", "stack": "torch"},
        hf_config={"model_type": "gptj", "n_embd": 64, "n_head": 4, "n_layer": 1, "rotary_dim": 8},
    )  # fmt: skip
    assert build_model(gptj, config, CPU).config._attn_implementation == "eager"
    assert build_model(case(method="full"), config, CPU).config._attn_implementation == "sdpa"
