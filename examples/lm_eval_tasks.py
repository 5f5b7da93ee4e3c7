"""A task for lm-eval from a run's held-out text: which of four continuations is the true one?

    fomoe export runs/quickstart --out models/quickstart
    python examples/lm_eval_tasks.py runs/quickstart --out tasks/quickstart
    python -m lm_eval --model hf --model_args pretrained=models/quickstart,dtype=float32 \\
      --tasks held_out --include_path tasks/quickstart --device cpu

The first half of a held-out sequence is the context. Its own second half and those of other
sequences are the choices, and the model takes the likeliest: a guess is right one time in four.
Nothing is downloaded.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
from pathlib import Path

import yaml

from fomoe.data.dataset import run_tokenizer
from fomoe.errors import DataError, FomoeError
from fomoe.evalrun import held_out_part
from fomoe.whole import open_whole


def main() -> int:
    """Write DIR/held_out.jsonl and DIR/held_out.yaml; 1 with a line if that cannot be done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("run", type=Path, help="folder of a run with a tokenizer")
    parser.add_argument("--out", type=Path, required=True, help="new folder for the task")
    parser.add_argument("--choices", type=int, default=4, help="of a question (default 4)")
    parser.add_argument("--seed", type=int, default=0, help="of the order of choices (default 0)")
    args = parser.parse_args()
    try:
        if args.out.exists():
            raise DataError(f"--out {args.out} is there already")
        rows = questions(args.run, num_choices=args.choices, seed=args.seed)
    except FomoeError as error:
        print(error, file=sys.stderr)
        return 1
    args.out.mkdir(parents=True)
    file = args.out.resolve() / "held_out.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    settings = task(file, args.run)
    (args.out / "held_out.yaml").write_text(yaml.safe_dump(settings, sort_keys=False))
    print(f"{args.out}: {len(rows)} questions with {args.choices} choices, --tasks held_out")
    return 0


def questions(run_dir: Path, *, num_choices: int, seed: int) -> list[dict[str, object]]:
    """A question per held-out sequence: `text`, `choices`, and the index of the `answer`.

    Raises:
        FomoeError: if the run cannot be read, or its held-out part is too small.
    """
    if num_choices < 2:
        raise DataError(f"--choices {num_choices} is too few: a question has at least 2")
    whole = open_whole(run_dir, None)
    whole.refuse_adapters("is evaluated on its own pairs (fomoe eval --metrics accuracy)")
    whole.refuse_copies("has no exported model")
    tokenizer = run_tokenizer(whole.config, run_dir, whole.fingerprints.get("tokenizer"))
    if tokenizer is None:
        raise DataError(f"{run_dir} was trained on token shards, without a tokenizer")
    halves = []
    for sequence in held_out_part(whole)[:, 1:].tolist():
        middle = len(sequence) // 2
        first, second = tokenizer.decode(sequence[:middle]), tokenizer.decode(sequence[middle:])
        # A character that the middle cuts in two would not be the model's text.
        if first and second and "\ufffd" not in first + second:
            halves.append((first, second))
    ends = sorted({second for _, second in halves})
    if len(ends) < num_choices:
        raise DataError(
            f"{run_dir} has {len(ends)} held-out texts that differ, and a question needs "
            f"{num_choices}: lower --choices"
        )
    draw = random.Random(seed)
    rows: list[dict[str, object]] = []
    for first, second in halves:
        choices = [second, *draw.sample([end for end in ends if end != second], num_choices - 1)]
        draw.shuffle(choices)
        rows.append({"text": first, "choices": choices, "answer": choices.index(second)})
    return rows


def task(file: Path, run_dir: Path) -> dict[str, object]:
    """lm-eval's settings of a multiple choice by log-likelihood; names are those of the rows."""
    return {
        "task": "held_out",
        "dataset_path": "json",
        "dataset_kwargs": {"data_files": {"test": str(file)}},
        "test_split": "test",
        "output_type": "multiple_choice",
        "doc_to_text": "text",
        "doc_to_choice": "choices",
        "doc_to_target": "answer",
        "target_delimiter": "",
        "metric_list": [{"metric": "acc"}, {"metric": "acc_norm"}],
        "metadata": {"version": 1, "run": str(run_dir)},
    }


if __name__ == "__main__":
    raise SystemExit(main())
