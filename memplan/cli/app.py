"""`main`: the `memplan` command. Exit status: 0 done (or it fits), 1 it does not fit (only `fit`), 2 bad input,
101 a bug, 130 Ctrl-C.

Only the command that is named gets imported; the others are there for help, completion and spelling.
"""

from __future__ import annotations

import difflib
import gc
import os
import re
import sys
import traceback
from collections.abc import Sequence
from importlib import import_module
from typing import Annotated

import typer

from memplan.cli.output import accept_any_encoding, emit
from memplan.errors import MemplanError

COMMANDS = {
    "estimate": "What a run takes: the peak, when it is, what is alive there, in three tiers.",
    "fit": "Whether a run fits on a GPU, and what to change if it does not.",
    "compare": "Full fine-tuning, LoRA and QLoRA side by side.",
    "plot": "Memory against rank or other knobs, or over one step, as a picture.",
    "cost": "How long a run takes on one GPU, and what it costs.",
    "plan": "The cheapest, the fastest and the best ways to train on so many tokens.",
    "calibrate": "Real short training steps on this machine's GPU, against their predictions.",
    "validate": "Measured runs against their predictions: no GPU needed.",
    "models": "The models that are bundled, and what memplan knows of one.",
    "gpus": "The GPUs that are known, as their drivers report them.",
}
"""Each is a module of this package with a function `register(app, summary)`."""

EPILOG = """Examples:

  memplan estimate llama-7b --method qlora --rank 16

  memplan compare llama-7b

  memplan models show qwen3-8b
"""


def build(named: str) -> typer.Typer:
    """The application with the command `named` in full and the others by name."""
    app = typer.Typer(
        add_completion=True,
        context_settings={"help_option_names": ["-h", "--help"]},
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
    )
    app.callback(epilog=EPILOG)(_memplan)
    for name, summary in COMMANDS.items():
        if name == named:
            import_module(f"memplan.cli.{name}").register(app, summary)
        else:
            app.command(name, help=summary)(_not_named)
    return app


def _show_version(wanted: bool) -> None:
    if wanted:
        from memplan import __version__

        emit(f"memplan {__version__}")
        raise typer.Exit


def _memplan(
    version: Annotated[
        bool, typer.Option("--version", is_eager=True, callback=_show_version, help="Show the version and exit.")
    ] = False,
) -> None:
    """GPU memory, time and cost of fine-tuning a language model, before anyone rents a GPU."""


def _not_named() -> None:
    raise AssertionError("only the command that is named runs")


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs `memplan` on `arguments` (the command line's unless given) and exits."""
    # Looking through every installed package for plugins of pydantic takes a tenth of the start.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    words = sys.argv[1:] if arguments is None else list(arguments)
    # What is imported stays: looking through it for garbage, time and again, takes as much once more.
    gc.disable()
    build(_named(words))
    gc.freeze()
    gc.enable()
    sys.exit(run(words))


def run(arguments: Sequence[str]) -> int:
    """Runs `memplan` and returns its exit status."""
    accept_any_encoding()
    named = _named(arguments)
    try:
        status = build(named)(args=list(arguments) or ["--help"], prog_name="memplan", standalone_mode=False)
        # No command at all: help, and the status of a usage error.
        return 2 if not arguments else status if isinstance(status, int) else 0
    except MemplanError as error:
        return _complain(error.message, error.hints or [_help_of(named)])
    except typer.TyperException as error:
        message, hints = _usage(error)
        return _complain(message, [*hints, _help_of(named)])
    except (KeyboardInterrupt, typer.Abort):
        emit("aborted", err=True)
        return 130
    except Exception as error:
        if os.environ.get("MEMPLAN_DEBUG") == "1":
            traceback.print_exc()
        hints = ["please report it with the command that was run", "`MEMPLAN_DEBUG=1` shows where"]
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        return _complain(f"a bug in memplan: {what}", hints, status=101)


def _named(arguments: Sequence[str]) -> str:
    """The command that the command line names, if it is one."""
    return next((word for word in _words(arguments) if not word.startswith("-")), "")


def _words(arguments: Sequence[str]) -> Sequence[str]:
    """The words of the command line, while a shell asks for completion too (bash; zsh and fish)."""
    if "_MEMPLAN_COMPLETE" not in os.environ:
        return arguments
    return (os.environ.get("COMP_WORDS") or os.environ.get("_TYPER_COMPLETE_ARGS", "")).split()[1:]


def _help_of(command: str) -> str:
    return f"`memplan {command} -h` shows what is legal" if command in COMMANDS else "`memplan -h` shows what is legal"


def _usage(error: typer.TyperException) -> tuple[str, list[str]]:
    """typer's complaint about the command line in memplan's words, and the nearest names."""
    message = error.format_message().replace("Value error, ", "").rstrip(".?")
    message, _, command = message.partition(". Did you mean ")
    possible = [f"`{name}`" for name in getattr(error, "possibilities", None) or ()] or [command.replace("'", "`")]
    if wrong := re.search(r"'([^']*)' is not one of (.+)$", message):
        legal = [name.strip("' ") for name in wrong.group(2).split(",")]
        possible = [f"`{name}`" for name in difflib.get_close_matches(wrong.group(1).lower(), legal, n=2, cutoff=0.5)]
    hints = [f"did you mean {' or '.join(possible)}?"] if any(possible) else []
    message = message.partition(" (Possible")[0]
    return message[:1].lower() + message[1:], hints


def _complain(message: str, hints: Sequence[str], status: int = 2) -> int:
    emit(f"error: {' '.join(message.split())}", err=True)
    for hint in hints:
        emit(f"hint: {hint}", err=True)
    return status


if __name__ == "__main__":
    main()
