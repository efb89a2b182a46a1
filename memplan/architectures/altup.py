"""gemma3n's several streams of hidden states (AltUp), [inputs, B, S, hidden], of which a layer computes one.

Source: transformers 5.17 models/gemma3n/modeling_gemma3n.py `Gemma3nTextAltUp`, `Gemma3nTextModel.forward`. For memory:
- predict and correct keep several tensors of all streams: what the products read, and the innovation repeated for each;
- both add in place to a view, for which backward copies the gradient of all streams (ops/views.py);
- the weights of the coefficients are clamped in training, which reads them past an adapter (`correction_coefs` then has
  one that gets no gradient) and does not work on quantised ones.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from memplan.architectures.builder import Builder
from memplan.dtypes import DType
from memplan.ops.clamp import clamp
from memplan.ops.linear import bmm, linear
from memplan.ops.pointwise import (
    add_in_place,
    add_number,
    clone,
    copied_in_backward,
    mul,
    mul_number,
    saves_result,
    sub,
    to,
)
from memplan.ops.rows import select, view_as
from memplan.ops.streams import repeat_first
from memplan.ops.tensor import Parameter, Tensor
from memplan.ops.views import add_to_view

Projection = Callable[[Tensor], Tensor]


@dataclass(slots=True)
class AltUp:
    """`Gemma3nTextAltUp`."""

    num_inputs: int
    correct_output_scale: Parameter
    correction_weight: Tensor
    prediction_coefs: Projection
    modality_router: Projection
    router_norm: Callable[[Tensor], Tensor]

    def compute_router_modalities(self, x: Tensor) -> Tensor:
        router_inputs = mul_number(self.router_norm(x))
        routed = self.modality_router(router_inputs)
        return to(saves_result(to(routed, DType.fp32)), x.dtype)

    def predict(self, hidden_states: Tensor) -> Tensor:
        """[inputs, B, S, hidden] to the same."""
        num, batch, tokens, hidden = hidden_states.shape
        modalities = self.compute_router_modalities(self.active(hidden_states))
        # permuted, so that its gradient is copied to be seen token by token
        all_coefs = copied_in_backward(self.prediction_coefs(modalities), (batch * tokens, num, num))
        # the streams seen by token, [B * S, hidden, inputs]: a view, and so is what comes back
        predictions = bmm(
            view_as(hidden_states, (batch * tokens, hidden, num)), all_coefs, (batch * tokens, hidden, num)
        )
        predictions = add_to_view(predictions, hidden_states, hidden_states.shape)
        return to(clone(predictions.view(*hidden_states.shape)), hidden_states.dtype)

    def correct(self, predictions: Tensor, activated: Tensor) -> Tensor:
        """`predictions` and what the layer made of one of them, [B, S, hidden]: all streams corrected."""
        num, batch, tokens, _ = predictions.shape
        modalities = self.compute_router_modalities(activated)
        innovation = sub(activated, self.active(predictions))
        innovation = repeat_first(innovation, num)
        weight = clamp(self.correction_weight, num_bounds=2)
        all_coefs = add_number(linear(modalities, weight, None, num))
        corrected = mul(innovation, all_coefs.view(num, batch, tokens, 1))
        corrected = add_in_place(corrected, predictions)
        return to(corrected, activated.dtype)

    def scale_corrected_output(self, corrected: Tensor) -> Tensor:
        scale = self.correct_output_scale
        return to(mul(to(corrected, scale.dtype), scale), corrected.dtype)

    @staticmethod
    def active(streams: Tensor) -> Tensor:
        return select(streams, streams.shape[1:])


def altup_of(build: Builder, norm: Callable[[Builder, str, int], Callable[[Tensor], Tensor]]) -> AltUp:
    """The streams' part of the layer being built, with norms made by `norm`."""
    spec = build.spec
    hidden, num = spec.hidden_size, spec.altup_num_inputs
    correct_output_scale = build.parameter(
        "altup.correct_output_scale", (hidden,), gets_gradient=spec.altup_correct_scale
    )
    correction_weight = build.bypassed_linear("altup.correction_coefs", num, num)
    prediction_coefs = build.linear("altup.prediction_coefs", num, num**2, quantise=False)
    modality_router = build.linear("altup.modality_router", hidden, num)
    router_norm = norm(build, "altup.router_norm", hidden)
    build.buffer("altup.router_input_scale", (), build.dtype)
    return AltUp(num, correct_output_scale, correction_weight, prediction_coefs, modality_router, router_norm)
