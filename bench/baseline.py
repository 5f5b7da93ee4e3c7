"""Compare a result's ratios with stored ones, so that a regression shows and says where.

Only ratios are stored: they carry over between machines of a kind, times do not.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

PATH = Path(__file__).parent / "baseline.json"
TOLERANCE = 0.15  # of the ratio; a busy machine moves single lines by more without a cause


def ratios(result: dict[str, Any]) -> dict[str, float]:
    """Every ratio of a result by the name of its line; more is better."""
    found = {}
    for row in result["layers"]:
        name = f"{row['shape']} | {row['what']}"
        if row["what"].startswith(("split", "grouped_mm", "megablocks")):
            found[f"{name} | share of product rate"] = row["share_of_products"]
            if row["over_full"] not in (None, 1.0):
                found[f"{name} | speed over full"] = 1 / row["over_full"]
    for row in result["steps"]:
        for field in ("over_transformers", "share_of_bound"):
            if row["what"].startswith("ours") and row[field] is not None:
                found[f"step | {row['what']} | {field}"] = row[field]
    for row in result["peaks"]:
        if row["products"] != "torch":
            found[f"peak | {row['what']} | torch over {row['products']}"] = 1 / row["over_torch"]
    for row in result["answers"]:
        if row["rows"] > 1:
            found[f"answers | {row['what']} | rows per answer"] = row["rows_per_answer"]
    return found


def compare(result: dict[str, Any], stored: dict[str, Any], *, whole: bool) -> list[str]:
    """One line per ratio that moved by more than the tolerance, or that has no counterpart.

    Args:
        whole: whether all parts were measured; else what is missing was not asked for.
    """
    kind = result["kind"]
    if kind not in stored:
        return [f"no baseline for {kind}; --store keeps this run as one"]
    own, before = ratios(result), stored[kind]
    lines = []
    for name in sorted({*own, *before}):
        if name not in own and not whole:
            continue
        if name not in own or name not in before:
            lines.append(f"{'gone' if name not in own else 'new'}: {name}")
            continue
        change = own[name] / before[name] - 1
        if abs(change) > TOLERANCE:
            word = "better" if change > 0 else "WORSE"
            lines.append(f"{word} {change:+.0%}: {name} ({before[name]:.2f} -> {own[name]:.2f})")
    return lines or [f"all {len(own)} ratios within {TOLERANCE:.0%} of the baseline"]


def load(path: Path = PATH) -> dict[str, Any]:
    return json.loads(path.read_text()) if path.exists() else {}


def store(result: dict[str, Any], path: Path = PATH, *, whole: bool) -> None:
    """Keep the ratios of a kind of machine; those of parts that were not measured stay."""
    stored = load(path)
    before = {} if whole else stored.get(result["kind"], {})
    stored[result["kind"]] = {**before, **ratios(result)}
    path.write_text(json.dumps(stored, indent=1, sort_keys=True) + "\n")
