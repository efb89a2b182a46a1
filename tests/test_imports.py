"""Imports point down only, and what is heavy stays out of what is quick."""

from __future__ import annotations

import ast
import subprocess
import sys
from fnmatch import fnmatch
from pathlib import Path

import pytest

import memplan
from memplan.cli.app import COMMANDS

PACKAGE = Path(memplan.__file__).parent
MODULES = {
    ".".join(("memplan", *path.relative_to(PACKAGE).with_suffix("").parts)).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}

# From the ground up: a module imports from its own layer and from those below.
LAYERS: list[tuple[str, ...]] = [
    ("errors", "units", "dtypes", "garbage"),
    (
        "hf_config",
        "hf_families",
        "hf_rules",
        "model_spec",
        "safetensors_header",
        "train_config",
        "config_errors",
        "gpu_table",
    ),
    ("catalog", "gpus", "hub", "prequantized", "prices", "profiles"),
    ("ops",),
    ("architectures",),
    ("memory",),
    ("estimate",),
    ("calibration", "timing"),
    ("*",),  # the questions: compare, explain, fit, cost, plan, plot, …
    ("report", "report_*", "*_report"),
    ("cli", "__main__"),
]
HEAVY = {"accelerate", "bitsandbytes", "matplotlib", "numpy", "peft", "pynvml", "torch", "transformers", "trl"}
# Where a heavy package may be imported at the top of a module.
MEASURING = "memplan.calibration"


def layer_of(module: str) -> int:
    """The layer of `memplan.x.y` by its part x; what no other layer names is a question."""
    part = [*module.split("."), ""][1]
    named = [index for index, names in enumerate(LAYERS) if any(fnmatch(part, name) for name in names if name != "*")]
    assert len(named) <= 1, module
    return named[0] if named else LAYERS.index(("*",))


def imported(module: str, *, at_import_time: bool) -> set[str]:
    """Modules that `module` imports: at its top, or anywhere. Imports for the type checker count as none."""
    tree = ast.parse(MODULES[module].read_text())
    found: set[str] = set()
    pending: list[ast.AST] = [tree]
    while pending:
        node = pending.pop()
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.dump(node.test):
            pending += node.orelse
            continue
        if at_import_time and isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module}: imports are absolute"
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name if name in MODULES else str(node.module) for name in names}
        pending += ast.iter_child_nodes(node)
    return found


@pytest.mark.parametrize("module", [name for name in MODULES if name != "memplan"])
def test_imports_point_down(module: str) -> None:
    for other in imported(module, at_import_time=False):
        if other.startswith("memplan."):
            assert layer_of(other) <= layer_of(module), f"{module} imports {other}, which stands above it"


def test_no_import_cycles() -> None:
    pending = {module: imported(module, at_import_time=True) & set(MODULES) - {module} for module in MODULES}
    while free := [module for module, needs in pending.items() if not needs & set(pending)]:
        for module in free:
            del pending[module]
    assert not pending, f"import each other: {sorted(pending)}"


@pytest.mark.parametrize("module", MODULES)
def test_heavy_packages_are_imported_where_they_are_needed(module: str) -> None:
    roots = {name.partition(".")[0] for name in imported(module, at_import_time=True)}
    if not module.startswith(MEASURING):
        assert not roots & HEAVY
    assert "click" not in {name.partition(".")[0] for name in imported(module, at_import_time=False)}


def loaded_by(*arguments: str) -> set[str]:
    """Top-level packages that are imported once `memplan …` is done."""
    return {name.partition(".")[0] for name in modules_after(*arguments)}


def modules_after(*arguments: str) -> list[str]:
    code = "import sys; from memplan.cli.app import run; run(sys.argv[1:]); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()[-1].split()


@pytest.mark.parametrize(
    "arguments",
    [
        ("--help",),
        ("estimate", "smollm2-135m", "--method", "qlora"),
        ("estimate", "smollm2-135m", "--json"),
        ("estimate", "smollm2-135m", "--explain"),
        ("compare", "smollm2-135m"),
        ("models",),
        ("gpus",),
    ],
    ids=" ".join,
)
def test_a_quick_command_imports_nothing_heavy(arguments: tuple[str, ...]) -> None:
    assert not loaded_by(*arguments) & (HEAVY | {"huggingface_hub", "yaml"})


@pytest.mark.parametrize("arguments", [("estimate", "smollm2-135m", "--json"), ("gpus", "--json"), ("--version",)])
def test_json_imports_no_rich(arguments: tuple[str, ...]) -> None:
    assert "rich" not in loaded_by(*arguments)


def test_an_estimate_imports_of_rich_what_tables_need() -> None:
    """Markdown, tracebacks and progress are most of rich, and Pygments is as much again."""
    loaded = set(modules_after("estimate", "smollm2-135m"))
    assert "rich.table" in loaded
    assert not loaded & {"pygments", "rich.markdown", "rich.pretty", "rich.progress", "rich.syntax", "rich.traceback"}


def test_only_the_named_command_is_imported() -> None:
    assert {f"memplan.cli.{name}" for name in COMMANDS} & set(modules_after("gpus")) == {"memplan.cli.gpus"}


def test_public_names_are_all() -> None:
    assert sorted(memplan.__all__) == list(memplan.__all__)
    assert all(hasattr(memplan, name) for name in memplan.__all__)
    assert set(memplan.__all__) <= set(dir(memplan))
    with pytest.raises(AttributeError, match="no attribute `no_such_name`"):
        memplan.no_such_name  # noqa: B018


@pytest.mark.parametrize("first", ["memplan.estimate", "memplan.fit", "memplan.plan", "memplan.report"])
def test_public_names_are_functions_in_whatever_order_modules_are_imported(first: str) -> None:
    code = (
        f"import sys, memplan; assert not [m for m in sys.modules if m.startswith('memplan.')]; import {first}; "
        "from memplan import cost; print(all(map(callable, (memplan.estimate, memplan.fit, memplan.plan, cost))))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout == "True\n"
