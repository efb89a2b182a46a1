"""gemma3n_text: gemma4's layers on one of several streams, with sparse gates and a low-rank residual.

Source: transformers 5.17 models/gemma3n/modeling_gemma3n.py. What is special for memory, beside what gemma4_text has:
- hidden states between layers are `altup_num_inputs` streams, [inputs, B, S, hidden] (altup.py), under autocast in
  fp32, as the magnitudes that they are scaled by;
- the streams that the model makes before the layers stay its locals until it makes one of them behind the layers;
- gates of the first layers are cut by `gaussian_topk` (ops/sparsity.py);
- the weights of the streams' coefficients are clamped in training, which fails for quantised ones: they are left alone.
"""

from __future__ import annotations

import math

from memplan.architectures.altup import altup_of
from memplan.architectures.builder import Builder
from memplan.architectures.decoder import Layer, Mlp, Norm
from memplan.architectures.gemma4 import Gemma4
from memplan.architectures.shared import Shared
from memplan.dtypes import DType
from memplan.ops.pointwise import add, clone, mean_last, mul, mul_in_place, mul_number, pow_number, to
from memplan.ops.rows import select
from memplan.ops.sparsity import gaussian_topk
from memplan.ops.streams import divide, maximum, mean_first, sqrt, stack_first
from memplan.ops.tensor import Tensor
from memplan.ops.views import add_to_view, set_item

_OWN = "per_layer_input"
SKIPPED = ("lm_head", "prediction_coefs", "correction_coefs")
"""What `llm_int8_skip_modules` must name for a quantised base to train at all."""


class Gemma3n(Gemma4):
    registered_late = ("model.embed_tokens_per_layer", "model.per_layer", "model.altup_")

    def layer_kind(self, index: int) -> str:
        spec, kind = self.spec, self.attention_kind(index)
        sparsity = spec.activation_sparsity_pattern[index]
        kind += f" with {sparsity:g} of its gates cut" if sparsity else ""
        kind += f" of width {spec.layer_intermediate_size(index)}" if spec.intermediate_sizes else ""
        by_depth = self.config.quant_type == "int8" and not spec.altup_correct_scale
        return f"{kind} {index}" if by_depth else kind

    def first_of(self, kind: str) -> int:
        """The first layer of `kind`."""
        return next(index for index in range(self.spec.num_hidden_layers) if self.layer_kind(index) == kind)

    def stream_variance(self, num_layers: int) -> float:
        """Variance of the hidden states behind `num_layers` layers of fresh weights: to the active stream, v, and to
        its norm, alike in all but size, come LAuReL's norm and attention's; the sum is halved, the MLP's norm added."""
        variance = self.spec.initializer_range**2 * self.spec.hidden_size
        for _ in range(num_layers):
            variance = ((math.sqrt(variance) + 1.0) ** 2 + 2.0) / 2.0 + 1.0
        return variance

    def shared_dtype(self, hidden: DType) -> DType:
        return DType.fp32 if self.config.autocast else hidden

    def warnings(self) -> list[str]:
        if self.config.method != "qlora":
            return super().warnings()
        names = ", ".join(f'"{name}"' for name in SKIPPED)
        return [
            *super().warnings(),
            "transformers clamps weights of Gemma 3n while it trains, which fails for quantised ones: estimated with "
            f"BitsAndBytesConfig(llm_int8_skip_modules=[{names}]), without which no step runs",
        ]

    # Before the layers

    def project_per_layer(self, build: Builder, embeddings: Tensor, token_identity: Tensor) -> Tensor:
        spec, own = self.spec, self.spec.hidden_size_per_layer_input
        projection = build.linear("model.per_layer_model_projection", spec.hidden_size, spec.num_hidden_layers * own)
        norm = self.norm(build, "model.per_layer_projection_norm", own)
        projection_scale = build.buffer("model.per_layer_projection_scale", (), build.dtype)
        input_scale = build.buffer("model.per_layer_input_scale", (), build.dtype)
        projected = mul_in_place(projection(embeddings), to(projection_scale, embeddings.dtype))
        projected = projected.view(*self.batch, spec.num_hidden_layers, own)
        projected = norm(projected)
        return mul(add(projected, token_identity.view(*projected.shape)), to(input_scale, embeddings.dtype))

    def enter(self, build: Builder, hidden_states: Tensor) -> Tensor:
        """The streams: the embeddings, and projections of them, each scaled to the magnitude of the embeddings."""
        hidden, num = self.spec.hidden_size, self.spec.altup_num_inputs
        build.input_variance = self.stream_variance(0)
        projections = [build.linear(f"model.altup_projections.{i}", hidden, hidden) for i in range(num - 1)]
        build.input_variance = 1.0
        target_magnitude = _magnitude(hidden_states)
        streams = [hidden_states]
        altup_proj = current = new_magnitude = None
        for projection in projections:
            altup_proj = projection(hidden_states)
            current = to(altup_proj, hidden_states.dtype)
            new_magnitude = _least_magnitude(current)
            current = divide(mul(current, target_magnitude), new_magnitude)
            streams.append(current)
        stacked = stack_first(streams)
        assert build.held is not None
        build.held += [altup_proj] if altup_proj is not None else []
        build.rebound = {"target_magnitude": [target_magnitude], "temp_hidden_states": streams}
        if current is not None and new_magnitude is not None:
            build.rebound |= {"current_hidden_state": [current], "new_magnitude": [new_magnitude]}
        return stacked

    # A layer

    def layer(self, build: Builder, kind: str, shared: Shared) -> Layer:
        spec, read = self.spec, build.carried
        hidden, own = spec.hidden_size, spec.hidden_size_per_layer_input
        attention = self.attention_of(build, kind, shared)
        mlp = self.mlp(build, kind)
        norm = self.norm(build, "input_layernorm", hidden)
        post_attention_norm = self.norm(build, "post_attention_layernorm", hidden)
        pre_mlp_norm = self.norm(build, "pre_feedforward_layernorm", hidden)
        post_mlp_norm = self.norm(build, "post_feedforward_layernorm", hidden)
        altup = altup_of(build, self.norm)
        laurel = self.laurel(build)
        # the scale is zero in a fresh model
        build.input_variance = 0.0 if spec.altup_correct_scale else self.stream_variance(self.first_of(kind) + 1)
        gate = build.linear("per_layer_input_gate", hidden, own)
        projection = build.linear("per_layer_projection", own, hidden)
        build.input_variance = 1.0
        post_own_norm = self.norm(build, "post_per_layer_input_norm", hidden)
        activation = self.activation()

        def forward(hidden_states: Tensor) -> Tensor:
            predictions = altup.predict(hidden_states)
            active_prediction = altup.active(predictions)
            active_prediction_normed = norm(active_prediction)
            laurel_output = laurel(active_prediction_normed)
            attn, _ = attention(active_prediction_normed)
            attn = post_attention_norm(attn)
            attn_gated = add(active_prediction, attn)
            attn_laurel = mul_number(add(attn_gated, laurel_output))
            attn_norm = pre_mlp_norm(attn_laurel)
            attn_ffw = mlp(attn_norm)
            attn_ffw_norm = post_mlp_norm(attn_ffw)
            attn_ffw_laurel_gated = add(attn_laurel, attn_ffw_norm)
            corrected_predictions = altup.correct(predictions, attn_ffw_laurel_gated)
            first_prediction = clone(altup.active(corrected_predictions))
            if spec.altup_correct_scale:
                first_prediction = altup.scale_corrected_output(first_prediction)
            first_prediction = gate(first_prediction)
            first_prediction = activation(first_prediction)
            first_prediction = mul(first_prediction, read[_OWN])
            first_prediction = projection(first_prediction)
            first_prediction = post_own_norm(first_prediction)
            others = (spec.altup_num_inputs - 1, *first_prediction.shape)
            corrected_predictions = add_to_view(corrected_predictions, first_prediction, others)
            return set_item(corrected_predictions, select(corrected_predictions, others))

        return forward

    def laurel(self, build: Builder) -> Mlp:
        hidden, rank = self.spec.hidden_size, self.spec.laurel_rank
        linear_left = build.linear("laurel.linear_left", hidden, rank)
        linear_right = build.linear("laurel.linear_right", rank, hidden)
        norm = self.norm(build, "laurel.post_laurel_norm", hidden)

        def forward(hidden_states: Tensor) -> Tensor:
            laurel_hidden_states = linear_left(hidden_states)
            laurel_hidden_states = linear_right(laurel_hidden_states)
            normed_laurel_hidden_states = norm(laurel_hidden_states)
            return add(hidden_states, normed_laurel_hidden_states)

        return forward

    def mlp(self, build: Builder, kind: str) -> Mlp:
        index = self.first_of(kind)
        hidden, width = self.spec.hidden_size, self.spec.layer_intermediate_size(index)
        sparsity = build.gate_sparsity = self.spec.activation_sparsity_pattern[index]
        gate_proj = build.linear("mlp.gate_proj", hidden, width)
        up_proj = build.linear("mlp.up_proj", hidden, width)
        down_proj = build.linear("mlp.down_proj", width, hidden)
        activation = self.activation()

        def forward(x: Tensor) -> Tensor:
            gate = gate_proj(x)
            if sparsity > 0.0:
                gate = gaussian_topk(gate)
            activations = activation(gate)
            up = up_proj(x)
            down = down_proj(mul(activations, up))
            return down  # noqa: RET504  the others live until here

        return forward

    # Behind the layers

    def final_norm(self, build: Builder) -> Norm:
        """One stream of all of them, and its norm."""
        hidden, num = self.spec.hidden_size, self.spec.altup_num_inputs
        norm = self.norm(build, "model.norm", hidden)
        build.input_variance = self.stream_variance(self.spec.num_hidden_layers)
        projections = [build.linear(f"model.altup_unembed_projections.{i}", hidden, hidden) for i in range(num - 1)]
        build.input_variance = 1.0

        def forward(hidden_states: Tensor) -> Tensor:
            shape, dtype = hidden_states.shape[1:], self.dtype_of_token_embeddings(self.embedding_dtype)
            target_magnitude = _magnitude(select(hidden_states, shape))
            build.rebind("target_magnitude")
            streams = [select(hidden_states, shape)]
            build.rebind("temp_hidden_states")
            altup_unemb_proj = current = new_magnitude = None
            for projection in projections:
                altup_unemb_proj = projection(select(hidden_states, shape))
                current = to(altup_unemb_proj, dtype)
                if new_magnitude is None:
                    build.rebind("current_hidden_state")
                new_magnitude = _least_magnitude(current)
                if len(streams) == 1:
                    build.rebind("new_magnitude")
                current = divide(mul(current, target_magnitude), new_magnitude)
                streams.append(current)
            hidden_states = stack_first(streams)
            hidden_states = mean_first(hidden_states)
            hidden_states = norm(hidden_states)
            build.holds(target_magnitude, *streams)
            return hidden_states

        return forward


def _magnitude(x: Tensor) -> Tensor:
    """torch.mean(x**2, dim=-1, keepdim=True) ** 0.5"""
    return pow_number(mean_last(pow_number(x)))


def _least_magnitude(x: Tensor) -> Tensor:
    """torch.sqrt(torch.maximum(torch.mean(x**2, dim=-1, keepdim=True), epsilon))"""
    m = x.machine
    new_magnitude = mean_last(pow_number(x))
    epsilon = m.empty((), DType.fp32)  # made on the host, and brought to the device for each stream
    return sqrt(maximum(new_magnitude, epsilon))
