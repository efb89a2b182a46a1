"""How long an estimate takes, part by part: `python tests/bench_estimate.py`. CPU milliseconds, the least of several.

No test: a time is no property of the code alone. With PYTHONDONTWRITEBYTECODE set, starts compile all of memplan anew.
"""

from __future__ import annotations

import resource
import subprocess
import sys
import time
from collections.abc import Callable

from memplan import Estimate, TrainConfig, catalog, fit, solve
from memplan.memory.resident import forget
from memplan.memory.simulate import simulate

CARD = "a100-80gb"
RUNS = (
    ("llama-7b", TrainConfig(method="qlora", rank=16)),
    ("llama-7b", TrainConfig(method="full")),
    ("mixtral-8x7b", TrainConfig(method="lora")),
    ("llama-2-70b", TrainConfig(method="qlora", rank=16)),
    ("llama-2-70b", TrainConfig(method="full")),
)
START = {
    "import typer, pydantic": "import typer, pydantic",
    "import memplan.estimate": "import memplan.estimate",
    "memplan --version": "from memplan.cli.app import main; main(['--version'])",
    "memplan estimate": "from memplan.cli.app import main; main('estimate llama-7b --method qlora --rank 16'.split())",
}


def cpu(work: Callable[[], object], repeats: int = 5) -> float:
    found = []
    for _ in range(repeats):
        began = time.process_time()
        work()
        found.append(time.process_time() - began)
    return min(found) * 1e3


def cpu_of_process(code: str, repeats: int = 5) -> float:
    found = []
    for _ in range(repeats):
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        subprocess.run([sys.executable, "-c", code], check=True, stdout=subprocess.DEVNULL)
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
        found.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return min(found) * 1e3


def afresh(model: str, config: TrainConfig) -> Estimate:
    forget()
    return Estimate(catalog.load(model), config, None)


def row(model: str, config: TrainConfig) -> None:
    made = afresh(model, config)
    first, again = cpu(lambda: afresh(model, config)), cpu(lambda: Estimate(made.model, config, None))
    replay = cpu(lambda: simulate(made.program))
    fits = cpu(lambda: fit(made.model, config, gpu=CARD).largest, 2)
    solved = cpu(lambda: solve(made.model, config, gpu=CARD), 2)
    print(
        f"{model:14s} {config.method:6s} {first:7.1f} {again:7.1f} {replay:7.1f} {first + replay:9.1f}"
        f" {fits:8.0f} {solved:8.0f}"
    )


if __name__ == "__main__":
    for name, code in START.items():
        print(f"{name:24s} {cpu_of_process(code):6.0f} ms, Python's own start included")
    print(f"\n{'model':14s} method  ledger   again  replay  estimate      fit    solve  (ms; {CARD})")
    for model, config in RUNS:
        row(model, config)
