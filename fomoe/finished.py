"""The commands on a run that has saved a checkpoint: `fomoe export | eval | generate`.

Heavy imports wait until they are needed.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from fomoe.adapters.options import ANSWER_METRICS
from fomoe.errors import ConfigError, say_line
from fomoe.formats import FORMATS
from fomoe.hints import hint


def add_commands(commands: Any) -> None:
    """Add them to the command line's subparsers."""
    _add_export(commands)
    _add_eval(commands)
    _add_generate(commands)


def _add_run(commands: Any, name: str, help_text: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = commands.add_parser(name, help=help_text)
    parser.add_argument("run_dir", metavar="RUN", type=Path, help="a run's folder")
    parser.add_argument(
        "--round", type=int, metavar="N", help="rounds done (default: the newest complete)"
    )
    return parser


def _add_export(commands: Any) -> None:
    parser = _add_run(commands, "export", "write the whole model as a transformers checkpoint")
    parser.add_argument("--out", required=True, type=Path, metavar="DIR", help="folder to write")
    parser.add_argument(
        "--format",
        metavar="NAME",
        help=f"{', '.join(FORMATS)} (default: the first that can say the model)",
    )
    parser.add_argument("--dtype", default="fp32", help="fp32 (default), bf16 or fp16")
    parser.add_argument(
        "--adapter", action="store_true", help="write the adapters of a fine-tuning run for peft"
    )
    parser.add_argument(
        "--rank", type=int, metavar="N", help="with --adapter: keep N dimensions (default: all)"
    )
    parser.add_argument(
        "--merge", action="store_true", help="with --adapter: write the base with them added"
    )
    parser.set_defaults(run=_export)


def _add_eval(commands: Any) -> None:
    parser = _add_run(commands, "eval", "loss of the whole model and of every site's own")
    parser.add_argument(
        "--text", type=Path, metavar="FILE", help="a text (default: the run's held-out part)"
    )
    parser.add_argument("--device", default="auto", help="auto (default), cpu, cuda or cuda:N")
    parser.add_argument(
        "--metrics",
        metavar="NAME,NAME",
        help=f"with adapters on pairs, beside the losses: {', '.join(ANSWER_METRICS)}",
    )
    parser.add_argument(
        "--max-tokens", type=int, metavar="N", help="with rouge-l: of a completion (default 32)"
    )
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.set_defaults(run=_eval)


def _add_generate(commands: Any) -> None:
    parser = _add_run(commands, "generate", "continue a text with the whole model")
    parser.add_argument("--prompt", required=True, metavar="TEXT", help="the text to continue")
    parser.add_argument(
        "--max-tokens", type=int, default=100, metavar="N", help="new tokens (default 100)"
    )
    parser.add_argument(
        "--temperature",
        type=float,
        default=0.8,
        metavar="X",
        help="of the sampling; 0: always the likeliest token (default 0.8)",
    )
    parser.add_argument(
        "--top-k", type=int, default=0, metavar="N", help="likeliest tokens drawn from; 0: all"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the draws (default 0)")
    parser.set_defaults(run=_generate)


def _export(args: argparse.Namespace) -> int:
    if args.adapter:
        return _export_adapter(args)
    for field, value in (("--rank", args.rank), ("--merge", args.merge or None)):
        if value is not None:
            raise ConfigError(field, value, "needs --adapter")
    from fomoe.exporting import export

    export(
        args.run_dir,
        args.out,
        format_name=args.format,
        round_idx=args.round,
        dtype=args.dtype,
        say=say_line,
    )
    print(args.out)
    return 0


def _export_adapter(args: argparse.Namespace) -> int:
    from fomoe.adapters.exporting import export_adapter

    if args.format is not None or args.dtype != "fp32":
        field = "--format" if args.format is not None else "--dtype"
        raise ConfigError(field, args.format or args.dtype, "has no meaning beside --adapter")
    export_adapter(
        args.run_dir,
        args.out,
        rank=args.rank,
        merge=args.merge,
        round_idx=args.round,
        say=say_line,
    )
    print(args.out)
    return 0


def _eval(args: argparse.Namespace) -> int:
    from fomoe.evalrun import evaluate_run

    metrics = args.metrics.split(",") if args.metrics is not None else []
    for name in metrics:
        if name not in ANSWER_METRICS:
            raise ConfigError("--metrics", name, f"is no metric; {hint(name, ANSWER_METRICS)}")
    if args.max_tokens is not None:
        if "rouge-l" not in metrics:
            raise ConfigError("--max-tokens", args.max_tokens, "needs --metrics rouge-l")
        if not 1 <= args.max_tokens <= 10**6:
            raise ConfigError("--max-tokens", args.max_tokens, "must be from 1 to 1000000")
    result = evaluate_run(
        args.run_dir,
        text=args.text,
        round_idx=args.round,
        device=args.device,
        metrics=metrics,
        max_tokens=args.max_tokens or 32,
        say=say_line,
    )
    if args.json:
        print(json.dumps(result))
    else:
        from fomoe.report import print_evaluation

        print_evaluation(result)
    return 0


def _generate(args: argparse.Namespace) -> int:
    for field, value, least, most in (
        ("--max-tokens", args.max_tokens, 1, 10**6),
        ("--temperature", args.temperature, 0, 100),
        ("--top-k", args.top_k, 0, 10**9),
        ("--seed", args.seed, 0, 2**32 - 1),
    ):
        if not least <= value <= most:  # NaN too
            raise ConfigError(field, value, f"must be from {least} to {most}")
    from fomoe.generate import generate

    text = generate(
        args.run_dir,
        args.prompt,
        round_idx=args.round,
        max_tokens=args.max_tokens,
        temperature=args.temperature,
        top_k=args.top_k,
        seed=args.seed,
        say=say_line,
    )
    print(text)
    return 0
