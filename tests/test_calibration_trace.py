"""Allocation traces: torch's history made small, and read back."""

from memplan.calibration.trace import Part, compact, read_trace, short_stack, write_trace


def frame(name, filename="lib/libtorch_cpu.so", line=0):
    return {"name": name, "filename": filename, "line": line}


STACK = [
    frame("c10::cuda::CUDACachingAllocator::Native::malloc(void**, unsigned long)"),
    frame("at::native::structured_mm_out_cuda::impl(at::Tensor const&)"),
    frame("at::_ops::mm::redispatch(c10::DispatchKeySet, at::Tensor const&, at::Tensor const&)"),
    frame("at::_ops::mm::call(at::Tensor const&, at::Tensor const&)"),
    frame("torch::autograd::generated::MmBackward0::apply(std::vector<at::Tensor>&&)"),
    frame("_wrapped_call_impl", "/x/site-packages/torch/nn/modules/module.py", 1),
    frame("forward", "/x/site-packages/transformers/models/llama/modeling_llama.py", 123),
]
HISTORY = [
    {"action": "segment_alloc", "addr": 0, "size": 2097152, "stream": 0, "frames": STACK},
    {"action": "alloc", "addr": 0, "size": 1000, "stream": 0, "frames": STACK},
    {"action": "alloc", "addr": 1024, "size": 5, "stream": 7, "frames": []},
    {"action": "free_requested", "addr": 0, "size": 1000, "stream": 0, "frames": []},
    {"action": "free_completed", "addr": 0, "size": 1000, "stream": 0, "frames": []},
]
SEGMENTS = [{
    "address": 9, "total_size": 2097152, "segment_type": "small", "stream": 0,
    "blocks": [{"size": 512, "requested_size": 4, "state": "active_allocated"},
               {"size": 2096640, "requested_size": 0, "state": "inactive"}],
}]  # fmt: skip
MARKS = [[2, 0, "forward", 0, 0], [2, 0, "backward", 1, 0]]


def part():
    return compact("step 2", MARKS, SEGMENTS, HISTORY)


def test_a_stack_keeps_the_operators_and_the_lines_of_the_model():
    assert short_stack(STACK) == (
        "native.structured_mm_out_cuda", "aten.mm", "MmBackward0", "llama/modeling_llama.py:123 forward",
    )  # fmt: skip


def test_events_carry_their_phase_and_stack():
    taken, first, second, freed = part().events
    assert [part().phase(e) for e in (taken, first, second, freed)] == [
        "forward",
        "forward",
        "backward",
        "backward",
    ]
    assert part().frames(first)[1] == "aten.mm"
    assert part().frames(second) == part().frames(freed) == []
    assert part().segments == [[9, 2097152, "small", 0, [[512, 4, "a"], [2096640, 0, "i"]]]]


def test_the_history_can_be_had_again_in_torchs_words():
    kept = [{k: e[k] for k in ("action", "addr", "size", "stream")} for e in HISTORY if "requested" not in e["action"]]
    assert part().entries() == kept


def test_a_file_is_read_as_it_was_written(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    write_trace(path, [part(), compact("load", [], [], [])])
    assert read_trace(path) == [part(), compact("load", [], [], [])]


def test_a_file_stays_within_its_bound_and_says_what_it_dropped(tmp_path):
    path = tmp_path / "trace.jsonl.gz"
    entries = [{"action": "alloc", "addr": n * 7919, "size": n * n, "frames": ()} for n in range(5000)]
    write_trace(path, [compact("step 2", MARKS, [], entries)], max_bytes=10_000)
    (read,) = read_trace(path)
    assert path.stat().st_size <= 10_000
    assert isinstance(read, Part)
    assert 0 < len(read.events) == 5000 - read.num_dropped
