"""Optimizers: states against the real optimizers' own, temporaries and order against an H200's trace."""

from __future__ import annotations

from typing import Any

import pytest

from memplan.architectures.builder import Weight
from memplan.dtypes import DType
from memplan.errors import UnknownNameError
from memplan.memory.optimizers import OPTIMIZERS, optimizer_named, plan_update
from memplan.memory.optimizers.plan import Plan
from memplan.ops.tensor import Tape, round_block
from memplan.train_config import TrainConfig

# Embedding, a matrix, one too small for 8 bit, one that is paged, a norm.
SHAPES = {
    "model.embed_tokens.weight": (1000, 64),
    "mlp.up_proj.weight": (300, 64),
    "mlp.gate.weight": (8, 64),
    "mlp.down_proj.weight": (400, 300),
    "norm.weight": (64,),
}
BNB = {
    "adamw_bnb_8bit": ("AdamW", 8, False),
    "adamw_8bit": ("AdamW", 8, False),
    "paged_adamw_8bit": ("AdamW", 8, True),
    "paged_adamw_32bit": ("AdamW", 32, True),
    "lion_8bit": ("Lion", 8, False),
    "lion_32bit": ("Lion", 32, False),
    "paged_lion_8bit": ("Lion", 8, True),
    "paged_lion_32bit": ("Lion", 32, True),
    "rmsprop_bnb": ("RMSprop", 32, False),
    "rmsprop_bnb_8bit": ("RMSprop", 8, False),
    "rmsprop_bnb_32bit": ("RMSprop", 32, False),
    "ademamix": ("AdEMAMix", 32, False),
    "ademamix_8bit": ("AdEMAMix", 8, False),
    "paged_ademamix_32bit": ("AdEMAMix", 32, True),
    "paged_ademamix_8bit": ("AdEMAMix", 8, True),
}


def weights(dtype: DType = DType.bf16) -> list[Weight]:
    return [
        Weight(name, shape, dtype, True, "weights", of="Embedding" if "embed" in name else "")
        for name, shape in SHAPES.items()
    ]


def plan(optimizer: str, dtype: DType = DType.bf16, **config: Any) -> Plan:
    config.setdefault("stack", "torch")
    return plan_update(weights(dtype), TrainConfig(method="full", optimizer=optimizer, **config))


def state_sizes(made: Plan) -> list[int]:
    tape = [*made.made, *made.first]
    return sorted(size for slot, size in tape if size and made.kinds[slot] == "optimizer_states")


def tensors_of(state: Any) -> list[Any]:
    import torch

    found: dict[int, Any] = {}
    stack = [state]
    while stack:
        item = stack.pop()
        if isinstance(item, dict):
            stack += item.values()
        elif isinstance(item, torch.Tensor):
            found[item.untyped_storage().data_ptr()] = item
    return list(found.values())


def real_torch_optimizer(name: str, parameters: list[Any]) -> Any:
    import torch
    from transformers.optimization import Adafactor

    options: dict[str, dict[str, Any]] = {
        "adamw_torch": {"foreach": True},
        "adamw_torch_fused": {"fused": True},
        "adamw_torch_forloop": {"foreach": False},
        "sgd_momentum": {"momentum": 0.9},
    }
    cls: Any = {
        "adafactor": Adafactor,
        "sgd": torch.optim.SGD,
        "sgd_momentum": torch.optim.SGD,
        "rmsprop": torch.optim.RMSprop,
        "adagrad": torch.optim.Adagrad,
    }.get(name, torch.optim.AdamW)
    chosen = {"scale_parameter": False, "relative_step": False} if name == "adafactor" else options.get(name, {})
    return cls(parameters, lr=1e-3, **chosen)


@pytest.mark.parametrize("dtype", [DType.bf16, DType.fp32])
@pytest.mark.parametrize("name", sorted(set(OPTIMIZERS) - set(BNB)))
def test_states_are_those_of_the_real_optimizer(name: str, dtype: DType) -> None:
    import torch

    torch_dtype = torch.bfloat16 if dtype is DType.bf16 else torch.float32
    parameters = [torch.nn.Parameter(torch.ones(shape, dtype=torch_dtype)) for shape in SHAPES.values()]
    optimizer = real_torch_optimizer(name, parameters)
    for parameter in parameters:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    on_host = () if name == "adamw_torch_fused" else ("step",)  # the fused one keeps it on the device
    real = sorted(
        round_block(tensor.numel() * tensor.element_size())
        for state in optimizer.state.values()
        for tensor in tensors_of({key: value for key, value in state.items() if key not in on_host})
    )
    assert state_sizes(plan(name, dtype)) == real


@pytest.mark.parametrize("name", sorted(BNB))
def test_states_are_those_of_bitsandbytes(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    from bitsandbytes import optim
    from bitsandbytes.optim.optimizer import Optimizer8bit

    name_of_class, bits, paged = BNB[name]
    managed: list[int] = []

    def get_state_buffer(self: Any, p: Any, dtype: Any = torch.float32) -> Any:
        """As on CUDA: 1e5 elements and more of a paged optimizer are not the allocator's."""
        if self.is_paged and p.numel() >= 1e5:
            managed.append(p.numel() * dtype.itemsize)
            return torch.zeros(0, dtype=dtype)
        return torch.zeros(p.shape, dtype=dtype)

    def get_state_double_buffer(self: Any, p: Any, dtype: Any = torch.float32) -> Any:
        small = torch.zeros((2, *p.shape), dtype=dtype)
        if self.is_paged and p.numel() >= 1e5:
            managed.append(small.numel() * dtype.itemsize)
            return torch.zeros(0, dtype=dtype)
        return small

    monkeypatch.setattr(Optimizer8bit, "get_state_buffer", get_state_buffer)
    monkeypatch.setattr(optim.AdEMAMix, "_get_state_double_buffer", get_state_double_buffer)
    parameters = [torch.nn.Parameter(torch.ones(shape)) for shape in SHAPES.values()]
    options = {"is_paged": paged} if "rmsprop" not in name else {}
    optimizer = getattr(optim, name_of_class)(parameters, lr=1e-3, optim_bits=bits, **options)
    for index, parameter in enumerate(parameters):
        optimizer.init_state(optimizer.param_groups[0], parameter, 0, index)
    states = [tensors_of({k: v for k, v in optimizer.state[p].items() if "qmap" not in k}) for p in parameters]
    qmaps = 0 if bits == 32 else (1 if name_of_class in ("Lion", "RMSprop") else 2)
    real = [round_block(t.numel() * t.element_size()) for state in states for t in state if t.numel()]
    made = plan(name)
    assert state_sizes(made) == sorted(real + [1024] * qmaps)
    assert made.managed_bytes == sum(managed)


def test_trainer_keeps_embeddings_out_of_8_bit() -> None:
    """transformers 5.17 trainer.py `create_optimizer`: GlobalOptimManager, optim_bits 32 for nn.Embedding."""
    elements = 1000 * 64
    in_8_bit = 2 * elements + 2 * round_block(elements // 256 * 4)
    alone = plan("adamw_bnb_8bit").state_bytes
    assert plan("adamw_bnb_8bit", stack="trainer").state_bytes - alone == 8 * elements - in_8_bit
    assert plan("adamw_torch", stack="trainer").state_bytes == plan("adamw_torch").state_bytes


def holdings(tape: Tape) -> tuple[int, int]:
    """Bytes alive at the end of a tape and at its highest, beside those from before."""
    sizes: dict[int, int] = {}
    live = top = 0
    for slot, size in tape:
        live += size or -sizes.get(slot, 0)
        top = max(top, live)
        if size:
            sizes[slot] = size
    return live, top


@pytest.mark.parametrize("name", sorted(OPTIMIZERS))
@pytest.mark.parametrize("stack", ["torch", "trainer"])
def test_a_step_gives_back_what_is_no_state(name: str, stack: str) -> None:
    made = plan(name, stack=stack)
    started, _ = holdings([*made.made, *made.first])
    assert started == made.state_bytes
    sizes = {slot: size for slot, size in (*made.made, *made.first) if size}
    assert sum(size or -sizes[slot] for slot, size in made.later) == 0
    assert holdings(made.clip)[0] == 0


def test_temporaries_of_adamw() -> None:
    """One list like the parameters for foreach; two of one parameter and one of the next for the loop; none fused."""
    blocks = [round_block(w.numel * 2) for w in weights()]
    assert holdings(plan("adamw_torch").later) == (0, sum(blocks))
    assert holdings(plan("adamw_torch_fused").later) == (0, 0)
    pairs = [2 * here + before for before, here in zip([0, *blocks], blocks, strict=False)]
    assert holdings(plan("adamw_torch_forloop").later) == (0, max(pairs))


def test_clipping_takes_what_an_h200_took() -> None:
    """Record llama-full: 30 gradients, the largest of 8,192,000 elements, so 125 chunks each; then 30 norms."""
    trained = [Weight(f"w{i}", (1000,), DType.bf16, True, "weights") for i in range(29)]
    trained.append(Weight("embedding", (8000, 1024), DType.bf16, True, "weights"))
    tape = plan_update(trained, TrainConfig(method="full", stack="torch")).clip
    assert tape[:2] == [(0, 15360), (1, 512)]
    assert holdings(tape) == (0, 15360 + 30 * 512)
    mixed = [*trained, Weight("fp32", (1000,), DType.fp32, True, "weights")]
    tape = plan_update(mixed, TrainConfig(method="full", stack="torch")).clip
    # torch groups by dtype, the one seen last first
    assert [size for _, size in tape[:3]] == [512, 512, 0]


def test_adafactor_in_fp32_makes_no_copies() -> None:
    low, full = (holdings(plan("adafactor", dtype).later)[1] for dtype in (DType.bf16, DType.fp32))
    largest = round_block(400 * 300 * 4)
    assert low - full == 2 * largest


def test_an_unknown_name_is_an_error_that_suggests() -> None:
    with pytest.raises(UnknownNameError, match="unknown optimizer `adamw_tourch`") as caught:
        optimizer_named("adamw_tourch")
    assert "adamw_torch" in caught.value.near
    with pytest.raises(UnknownNameError):
        plan("galore_adamw")
