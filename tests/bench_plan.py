"""How many runs a second of processor time `plan` looks at, and how that grows: `python tests/bench_plan.py`.

No test: a time is no property of the code alone.
"""

from __future__ import annotations

import time
from collections.abc import Sequence

from memplan import catalog, gpus
from memplan.memory.resident import forget
from memplan.plan import plan
from memplan.prices import Price

CARDS = tuple(name for name in gpus.names() if gpus.get(name).bf16_flops and gpus.get(name).bandwidth_bytes_per_s)
ROWS = tuple(Price("bench", name, 1.0 + 0.1 * index) for index, name in enumerate(CARDS))


def measure(model: str, cards: Sequence[str], total_batch_size: int, repeats: int = 3) -> None:
    """Prints the fastest of `repeats` runs."""
    spec = catalog.load(model)
    seconds = []
    for _ in range(repeats):
        forget()
        began = time.process_time()
        found = plan(spec, num_tokens=50_000_000, gpu_names=cards, price_rows=ROWS, total_batch_size=total_batch_size)
        seconds.append(time.process_time() - began)
    best = min(seconds)
    print(
        f"{model:14s} {len(cards):3d} GPUs, batches up to {total_batch_size:3d}: {found.num_configurations:6,} runs"
        f" in {best:5.2f} s, {found.num_configurations / best:7,.0f} a second, {found.num_played} played"
    )


if __name__ == "__main__":
    for number in (1, 10, len(CARDS)):
        measure("llama-7b", CARDS[-number:], 16)
    for total in (1, 4, 64):
        measure("llama-7b", CARDS, total)
    for model in ("qwen3-0.6b", "llama-2-70b"):
        measure(model, CARDS, 16)
