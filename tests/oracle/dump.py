"""Print the phases of a run, and its allocations and frees one a line: `python -m tests.oracle.dump --help`."""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

from tests.oracle.configs import CONFIGS
from tests.oracle.step import OracleResult, run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="llama", help="a family of tests/oracle/configs.py, a config.json, or JSON")
    parser.add_argument("--set", action="append", default=[], metavar="KEY=JSON", help="change a config key")
    parser.add_argument("--layers", type=int, help="num_hidden_layers")
    parser.add_argument("--method", default="full", choices=["full", "lora", "qlora"])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--target-modules", default="all-linear", help="all-linear, or names with commas")
    parser.add_argument("--lora-dropout", type=float, default=0.0)
    parser.add_argument("--dora", action="store_true")
    parser.add_argument("--modules-to-save", default="")
    parser.add_argument("--no-double-quant", action="store_true")
    parser.add_argument("--no-kbit-prep", action="store_true")
    parser.add_argument("--adapter-dtype", default="fp32", choices=["fp32", "bf16", "fp16"])
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--seq", type=int, default=128)
    parser.add_argument("--ckpt", action="store_true", help="gradient checkpointing")
    parser.add_argument("--reentrant", action="store_true")
    parser.add_argument("--attention", default="sdpa", choices=["sdpa", "eager"])
    parser.add_argument("--padding", action="store_true", help="a real padding mask")
    parser.add_argument("--weight-dtype", default="bf16", choices=["bf16", "fp16", "fp32"])
    parser.add_argument("--autocast", action="store_true")
    parser.add_argument("--optimizer", default="adamw_torch")
    parser.add_argument("--accumulation", type=int, default=1)
    parser.add_argument("--loss", default="full", choices=["full", "chunked"])
    parser.add_argument("--stack", default="torch", choices=["torch", "trainer", "trl"], help="who calls the model")
    parser.add_argument(
        "--sdpa-first", default="cudnn", choices=["cudnn", "flash"], help="H100/H200/B200, or other GPUs"
    )
    parser.add_argument("--phases", default="", help="only these phases' events, with commas (default all but load)")
    parser.add_argument("--load", action="store_true", help="print the load events too")
    parser.add_argument("--step", type=int, default=1, help="events of this step: 0 or 1 (the default)")
    parser.add_argument("--quiet", action="store_true", help="phases only, no events")
    parser.add_argument("--json", action="store_true", help="phases as one JSON document, no events")
    return parser.parse_args()


def _config(args: argparse.Namespace) -> dict[str, Any]:
    if args.model in CONFIGS:
        config = dict(CONFIGS[args.model])
    elif args.model.lstrip().startswith("{"):
        config = json.loads(args.model)
    else:
        config = json.loads(Path(args.model).read_text())
    for item in args.set:
        key, _, value = item.partition("=")
        config[key] = json.loads(value)
    if args.layers is not None:
        from transformers import AutoConfig

        names = type(AutoConfig.for_model(config["model_type"])).attribute_map
        config[names.get("num_hidden_layers", "num_hidden_layers")] = args.layers
    return config


def _print_events(result: OracleResult, args: argparse.Namespace) -> None:
    wanted = set(filter(None, args.phases.split(",")))
    for event in result.events or ():
        shown = args.load if event.step < 0 else event.step == args.step and (not wanted or event.phase in wanted)
        if shown:
            shape = "x".join(map(str, event.shape)) or "scalar"
            print(
                f"{event.phase:9} {event.num_bytes:+13,d} live {event.live_bytes:14,d} #{event.storage:<6d}"
                f" {event.op:48} {event.dtype:9} {shape:20} {event.where}"
            )


def main() -> None:
    args = _arguments()
    config = _config(args)
    start = time.perf_counter()
    result = run(
        config,
        method=args.method,
        rank=args.rank,
        target_modules="all-linear" if args.target_modules == "all-linear" else tuple(args.target_modules.split(",")),
        lora_dropout=args.lora_dropout,
        use_dora=args.dora,
        modules_to_save=tuple(filter(None, args.modules_to_save.split(","))),
        double_quant=not args.no_double_quant,
        kbit_prep=not args.no_kbit_prep,
        adapter_dtype=args.adapter_dtype,
        batch=args.batch,
        seq=args.seq,
        gradient_checkpointing=args.ckpt,
        reentrant=args.reentrant,
        attention=args.attention,
        padding=args.padding,
        weight_dtype=args.weight_dtype,
        autocast=args.autocast,
        optimizer=args.optimizer,
        accumulation=args.accumulation,
        loss=args.loss,
        stack=args.stack,
        sdpa_first=args.sdpa_first,
        events=not (args.quiet or args.json),
    )
    seconds = time.perf_counter() - start
    if args.json:
        keys = ("model_bytes", "num_params", "num_trainable", "phases")
        json.dump({key: getattr(result, key) for key in keys}, sys.stdout, indent=1)
        print()
        return
    _print_events(result, args)
    print(
        f"model {result.model_bytes:,d} B, {result.num_params:,d} parameters,"
        f" {result.num_trainable:,d} trainable, {seconds:.2f} s"
    )
    for step, phases in enumerate(result.phases):
        for name, (alloc, peak) in phases.items():
            print(f"step {step} {name:9} alloc {alloc:16,d}  peak {peak:16,d}")


if __name__ == "__main__":
    main()
