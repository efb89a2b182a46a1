"""Composes the recorded pieces into a run: load, then steps of forward, backward, clip, optimizer, zero_grad."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from memplan.architectures.decoder import Decoder
from memplan.memory.carried import Crossing, Crossings
from memplan.memory.driver_addresses import ATTENTION, BACKWARD, CUDNN, ELEMENTWISE, PRODUCTS
from memplan.memory.optimizers import Plan
from memplan.memory.program import EMPTY_CACHE, Link, Program, Round
from memplan.memory.record import Stream, record_embedding, record_layer
from memplan.memory.record_head import Head, record_head
from memplan.memory.resident import Resident, resident
from memplan.memory.segment import PORT_DY, PORT_TIED, PORT_X, Segment
from memplan.memory.shared_lives import deaths_of_shared, lives_of_shared
from memplan.memory.training_loop import TrainingLoop
from memplan.ops.tensor import Tape

BLASLT_WORKSPACE_BYTES = 2**20
"""`parseCUDABlasLtWorkspaceSize`, torch 2.11 aten/src/ATen/cuda/CublasHandlePool.cpp; seen on an H200, one a thread."""

MAX_MICRO_STEPS = 128
"""Micro-steps of a step that are played; all batches are counted. From the second on they are alike to the ledger, and
long before the last of these the caching allocator repeats itself (rounds.py)."""


@dataclass
class Pieces:
    """The recordings of one kind of micro-step."""

    embedding: Segment
    shared_slots: list[int]
    layers: list[Segment]
    head: Head
    lives: list[str]
    """What lets go last of each shared tensor (shared_lives.py)."""
    deaths: dict[int, list[tuple[int, int]]]
    """By layer, where on its backward tape which of them go."""


class Composer:
    """Builds the program of one run."""

    def __init__(self, decoder: Decoder, *, workspace_bytes: int, num_steps: int = 3) -> None:
        self.decoder = decoder
        self.config = decoder.config
        self.workspace_bytes = workspace_bytes
        self.num_steps = num_steps
        self.program = Program()
        self.workspaces: set[tuple[str, str]] = set()
        """Thread and library of those taken: each keeps its own from its first product on."""
        self.settles: tuple[int, Tape] = 0, []
        self.loop = TrainingLoop(self.program, self.config)

    def compose(self) -> Program:
        first = self.record(accumulating=False)
        again = self.record(accumulating=True) if self.config.gradient_accumulation_steps > 1 else first
        held = resident(
            first.embedding,
            first.layers,
            first.head.segment,
            self.config,
            self.decoder.device,
            layer_prefix=self.decoder.layer_prefix,
            late=self.decoder.registered_late,
            workspace_bytes=self.workspace_bytes,
        )
        plan = held.plan
        self.program.attentions = [layer.attention for layer in first.layers]
        self._load(held)
        optimizer = self._make_optimizer(held)
        for step in range(self.num_steps):
            self.loop.begin_step(step)
            holders: list[tuple[int, Segment]] = []
            for micro in range(min(self.config.gradient_accumulation_steps, MAX_MICRO_STEPS)):
                begin, first_frame = len(self.program.plays), len(self.program.frames)
                made = self._micro_step(step, again if micro else first)
                self.program.rounds.append(Round(begin, len(self.program.plays), first_frame))
                if micro == 0:
                    holders = made
            self._update(step, plan, holders, optimizer)
        return self.program

    def record(self, *, accumulating: bool) -> Pieces:
        decoder, spec = self.decoder, self.decoder.spec
        embedding, shared_slots = record_embedding(decoder, accumulating=accumulating)
        stream = Stream(*embedding.out, embedding.out_requires_grad, is_leaf=embedding.holds_out)
        made: dict[tuple[str, Stream, bool, Crossing], Segment] = {}
        shared_dtype = embedding.shared_dtype
        layers = []
        crossings = Crossings(decoder, embedding)
        for index in range(spec.num_hidden_layers):
            keeps_x = index == 0 and embedding.keeps_out
            kind, crossing = decoder.layer_kind(index), crossings.of(index)
            key = kind, stream, keeps_x, crossing
            if key not in made:
                segment = made[key] = record_layer(
                    decoder,
                    kind,
                    stream,
                    shared_dtype,
                    crossing=crossing,
                    keeps_x=keeps_x,
                    accumulating=accumulating,
                )
                if segment.x_dies == "backward":  # whether the model holds it as well makes no difference then
                    made[kind, stream, False, crossing] = segment
            layers.append(made[key])
            crossings.carried.update(made[key].carried)
            stream = Stream(*made[key].out, made[key].out_requires_grad)
        if layers[0].holds_dx:
            embedding, shared_slots = record_embedding(decoder, accumulating=accumulating, dy_is_held=True)
        reentrant, by_position = self.config.reentrant, decoder.passes_mask_by_position
        lives = lives_of_shared(embedding, layers, shared_slots, reentrant=reentrant, mask_by_position=by_position)
        deaths = deaths_of_shared(layers, shared_slots, lives, reentrant=reentrant)
        head = record_head(decoder, stream, accumulating=accumulating)
        pieces = Pieces(embedding, shared_slots, layers, head, lives, deaths)
        for slot, life in zip(shared_slots, lives, strict=True):
            if life != "forward":  # kept for backward, by layers that only borrow it
                embedding.kinds[slot] = "activations"
        if all(piece.x_dies != "backward" for piece in (*layers, pieces.head.segment)) and not embedding.holds_out:
            for piece in (embedding, *layers):  # hidden states between pieces, which no backward needs
                piece.kinds[piece.out_slot] = "temporaries"
            for piece in (*layers, pieces.head.segment):
                piece.kinds[PORT_X] = "temporaries"
        return pieces

    def _load(self, held: Resident) -> None:
        program, loading = self.program, held.loading
        program.weights = held.weights
        if self.config.use_dora:
            self.workspaces.add(("forward", "cublas"))
        frame = program.frame(loading.kinds, held.loading_sizes)
        until = loading.num_before_kernels
        program.play("load", 0, frame, loading.base if until is None else loading.base[:until])
        if until is not None:
            program.play("load", 0, frame, loading.base[until:], loads=[ELEMENTWISE])
        program.play("prepare", 0, frame, loading.casts)
        if loading.empties_cache:
            program.play("prepare", 0, frame, EMPTY_CACHE)
        if loading.adapters:
            program.play(
                "prepare", 0, frame, loading.adapters, loads=[PRODUCTS if self.config.use_dora else ELEMENTWISE]
            )
        if (
            self.loop.is_trainer
        ):  # `_inner_training_loop` begins with accelerator.free_memory(), transformers trainer.py
            program.play("prepare", 0, frame, EMPTY_CACHE)
        self.settles = frame, loading.settles

    def _play(
        self,
        phase: str,
        step: int,
        frame: int,
        segment: Segment,
        tape: Tape,
        links: Iterable[Link] = (),
        between: Iterable[tuple[int, int, Tape]] = (),
        loads: Iterable[str] = (),
    ) -> None:
        """Plays one of `segment`'s tapes; where a thread calls a library for the first time, its workspace comes in.

        `between`: position, frame and tape of other plays in between. `loads`: the kernels that it calls.
        """
        thread = "backward" if phase == "backward" else "forward"
        inserts: list[tuple[int, int, Tape, tuple[str, ...]]] = [(at, other, freed, ()) for at, other, freed in between]
        for library, used, at in segment.first_calls:
            if used is not tape or not self.workspace_bytes or (thread, library) in self.workspaces:
                continue
            self.workspaces.add((thread, library))
            workspace: Tape = [(0, self.workspace_bytes if library == "cublas" else BLASLT_WORKSPACE_BYTES)]
            inserts.append((at, self.program.frame_for(workspace, "workspaces"), workspace, (PRODUCTS,)))
        begin = 0
        for at, other, inserted, called in sorted(inserts, key=lambda insert: insert[0]):
            if at > begin:
                self.program.play(phase, step, frame, tape[begin:at], links if begin == 0 else (), loads=loads)
                begin = at
            self.program.play(phase, step, other, inserted, loads=called)
        links = links if begin == 0 else ()
        self.program.play(phase, step, frame, tape[begin:] if begin else tape, links, loads=loads)

    def _micro_step(self, step: int, pieces: Pieces) -> list[tuple[int, Segment]]:
        """Returns the frames that hold the gradients, and what was played over each."""
        program = self.program
        embedding, layers, head = pieces.embedding, pieces.layers, pieces.head
        e = program.frame_of(embedding)
        if self.settles[1]:
            program.play("forward", step, *self.settles)
            self.settles = 0, []
        self._play("forward", step, e, embedding, embedding.forward)
        before, slot = e, embedding.out_slot
        frames: list[int] = []
        # by the first layer; where in it matters little
        called = [ATTENTION, CUDNN] if layers[0].attention and layers[0].attention.kernel == "cudnn" else [ATTENTION]
        for layer in layers:
            f = program.frame_of(layer)
            self._play(
                "forward",
                step,
                f,
                layer,
                layer.forward,
                [(f, PORT_X, before, slot)],
                loads=called if len(frames) == 1 else [],
            )
            if frames:
                program.play("forward", step, before, layers[len(frames) - 1].after_next)
            frames.append(f)
            before, slot = f, layer.out_slot
        h = program.frame_of(head.segment)
        rebound = [(at, e, embedding.rebound[name]) for name, at in head.segment.rebinds.items()]
        x_from = [(h, PORT_X, before, slot)]
        self._play("forward", step, h, head.segment, head.segment.forward, x_from, rebound, loads=called)
        # The model's forward returns: its locals go.
        program.play("forward", step, before, layers[-1].after_next)
        program.play("forward", step, e, embedding.after_model)
        program.play("forward", step, h, head.segment.after_model)
        for f, layer in zip(frames, layers, strict=True):
            if layer.after_model:
                program.play("forward", step, f, layer.after_model)
        frees_shared: dict[str, Tape] = {
            end: [(s, 0) for s, life in zip(pieces.shared_slots, pieces.lives, strict=True) if life == end]
            for end in ("forward", "layers", "positional")
        }
        program.play("forward", step, e, frees_shared["forward"])
        keeps_out = embedding.holds_out or embedding.frees_out
        if layers[0].x_dies == "model" and not keeps_out:
            program.play("forward", step, e, [(embedding.out_slot, 0)])
        self._play("loss", step, h, head.segment, head.loss)
        # The autocast block is left: its weight copies go, those that the graph does not keep.
        program.play("loss", step, e, embedding.after_forward)
        for f, layer in zip(frames, layers, strict=True):
            program.play("loss", step, f, layer.after_forward)
        program.play("loss", step, h, head.segment.after_forward)
        program.play("loss", step, h, head.outputs)

        self._play("backward", step, h, head.segment, head.segment.backward, loads=[BACKWARD])
        before, slot = h, head.segment.dx_slot
        gradients: dict[str, tuple[int, int]] = {}
        for index in reversed(range(len(layers))):
            if slot < 0:
                break
            f, layer = frames[index], layers[index]
            elsewhere = [PORT_X] if index == 0 and keeps_out else []
            if index + 1 < len(layers) and layers[index + 1].holds_dx:
                elsewhere.append(PORT_DY)
            tape = _without(elsewhere, layer.backward)
            dying = [(at, e, [(s, 0)]) for at, s in pieces.deaths.get(index, ())]
            if index == 0:  # with the last of the checkpoints goes what they share
                dying += [
                    (layer.checkpoint_dies, g, _without(elsewhere, other.after_stack) if g == f else other.after_stack)
                    for g, other in zip(frames, layers, strict=True)
                    if other.after_stack
                ]
            between = [(len(_without(elsewhere, layer.backward[:at])), frame, freed) for at, frame, freed in dying]
            links = [(f, PORT_DY, before, slot)]
            links += [(f, port, *gradients[name]) for name, port in layer.carried_ports.items()]
            self._play("backward", step, f, layer, tape, links, between)
            gradients |= {name: (f, made) for name, made in layer.carried_gradients.items()}
            before, slot = f, layer.dx_slot
        program.play("backward", step, e, frees_shared["positional"])
        if slot >= 0 or embedding.carried_ports:
            links = [(e, port, *gradients[name]) for name, port in embedding.carried_ports.items()]
            if slot >= 0:
                links.append((e, PORT_DY, before, slot))
            if head.segment.tied_slot >= 0:
                links.append((e, PORT_TIED, h, head.segment.tied_slot))
            # a graph that reentrant checkpoints share outlives the embedding's, if the first layer is in it
            outlived = embedding.frees_out and (PORT_X, 0) in layers[0].after_loss
            tape = _without([embedding.out_slot] if outlived else [], embedding.backward)
            if self.config.reentrant:
                tape = [event for event in tape if event not in frees_shared["layers"]]
            program.play("backward", step, e, tape, links)
        program.play("backward", step, h, head.after_backward)
        # The loop lets go of the loss, and with it of the graph.
        released = "clip" if self.config.stack == "torch" else "backward"
        if self.config.reentrant:  # the checkpoint's context holds its arguments as long as the graph lives
            program.play(released, step, e, frees_shared["layers"])
        if released == "clip":
            program.play(released, step, h, [(head.segment.out_slot, 0)])
        program.play(released, step, e, embedding.after_loss)
        for f, layer in zip(frames, layers, strict=True):
            if layer.after_loss:
                # the embedding lets go of what both keep
                elsewhere = [PORT_X] if f == frames[0] and embedding.holds_out else []
                program.play(released, step, f, _without(elsewhere, layer.after_loss))
        self.loop.end_micro_step(step, h, head.segment.out_slot)
        return [(e, embedding), *zip(frames, layers, strict=True), (h, head.segment)]

    def _make_optimizer(self, held: Resident) -> int:
        """The frame of the optimizer's states; some are made by its constructor."""
        plan = held.plan
        frame = self.program.frame(plan.kinds, held.plan_sizes)
        self.program.play("prepare", 0, frame, plan.made)
        self.program.optimizer_state_bytes = plan.state_bytes
        self.program.managed_bytes = plan.managed_bytes
        return frame

    def _update(self, step: int, plan: Plan, holders: list[tuple[int, Segment]], frame: int) -> None:
        """Clipping, the optimizer's step and zero_grad."""
        program = self.program
        self.loop.clip(step, plan.clip)
        program.play("optimizer", step, frame, plan.later if step else plan.first)
        for f, holder in holders:
            program.play("zero_grad", step, f, holder.zero_grad)


def _without(slots: list[int], tape: Tape) -> Tape:
    """`tape` where another piece lets go of what is in `slots`."""
    return [event for event in tape if event[1] or event[0] not in slots] if slots else tape
