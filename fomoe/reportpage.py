"""`fomoe report`: one self-contained HTML page about one run or several (no torch)."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from statistics import mean
from typing import Any

from fomoe import __version__
from fomoe.adapters.figures import rank_figures
from fomoe.adapters.report import result_rows
from fomoe.amounts import bytes_text, spread_text, times_text
from fomoe.errors import ConfigError
from fomoe.figures import Drawing, need_matplotlib
from fomoe.options import yaml_word
from fomoe.overrides import flatten
from fomoe.records import Group, Record, RunRecords, read_groups
from fomoe.runfigures import figures

_STYLE = """
:root { color-scheme: light dark; --back: #ffffff; --text: #1c1e21; --soft: #5c6066;
  --line: #d9dbdf; --grid: #dddfe3; --card: #f6f7f9; }
@media (prefers-color-scheme: dark) { :root { --back: #15171a; --text: #e4e6e9; --soft: #a2a7ae;
  --line: #34383e; --grid: #33373d; --card: #1d2024; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.2rem 1rem 3rem; max-width: 1360px; background: var(--back);
  color: var(--text); font: 15px/1.45 system-ui, sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.4rem; margin: 0 0 .2rem; } h2 { font-size: 1.1rem; margin: 2rem 0 .6rem; }
p, figcaption { color: var(--soft); margin: 0 0 .6rem; } figcaption { font-size: .85rem; }
.figures { display: grid; gap: 1rem; align-items: start;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, 21rem), 1fr)); }
figure { margin: 0; padding: .8rem; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; }
figure svg { display: block; width: 100%; height: auto; margin-bottom: .5rem; }
table { border-collapse: collapse; font-size: .88rem; overflow-wrap: normal; }
th, td { text-align: left; padding: .3rem .7rem .3rem 0; border-bottom: 1px solid var(--line);
  vertical-align: top; white-space: nowrap; }
td:first-child, td[data-name="folder"] { white-space: normal; overflow-wrap: anywhere;
  min-width: 8rem; }
th { color: var(--soft); font-weight: 600; white-space: normal; vertical-align: bottom; }
.wide { overflow-x: auto; }
@media (max-width: 900px) {
  tr.head { display: none; } table, tbody { display: block; }
  tr { display: block; padding: .4rem 0; border-bottom: 1px solid var(--line); }
  td { display: flex; justify-content: space-between; gap: 1rem; white-space: normal;
    padding: .1rem 0; border: 0; overflow-wrap: anywhere; }
  td::before { content: attr(data-name); color: var(--soft); white-space: nowrap; }
}
pre { padding: .8rem; overflow-x: auto; background: var(--card); border: 1px solid var(--line);
  border-radius: 8px; font-size: .8rem; overflow-wrap: normal; }
summary { cursor: pointer; }
"""


def write_report(folders: Sequence[Path], out: Path, *, images: Path | None = None) -> list[Path]:
    """Write the page, and every figure as PNG and PDF if asked.

    Args:
        folders: of the runs, finished or not; those that differ in the seed only are one group.
        out: the HTML file.
        images: a folder for the figures, which is made.

    Returns:
        The files that were written.

    Raises:
        FomoeError: if a folder holds no run, only some of them have adapters, or matplotlib is
            absent.
        OSError: if a file cannot be written.
    """
    need_matplotlib("fomoe report")
    if out.is_dir():
        raise ConfigError("--out", out, "is a folder; name a file")
    groups = read_groups(folders)
    drawn = list((rank_figures if _fine_tunes(groups) else figures)(groups))
    out.write_text(page(groups, drawn), encoding="utf-8")
    written = [out]
    if images is not None:
        images.mkdir(parents=True, exist_ok=True)
        for name, _, drawing in drawn:
            for suffix in (".png", ".pdf"):
                written.append(images / f"{name}{suffix}")
                drawing.save(written[-1])
    return written


def _fine_tunes(groups: list[Group]) -> bool:
    """Whether these are runs with adapters; they have no losses in common with the others."""
    kinds = [group.first.config.adapters.base is not None for group in groups]
    if any(kinds) and not all(kinds):
        folder = groups[kinds.index(True)].first.folder
        rule = "is fine-tuned with adapters, and others are not: make a report of each kind"
        raise ConfigError("RUN", folder, rule)
    return all(kinds)


def page(groups: list[Group], drawn: Sequence[tuple[str, str, Drawing]]) -> str:
    """The whole HTML text; it loads nothing."""
    title = ", ".join(group.name for group in groups)
    several = any(len(group.runs) > 1 for group in groups)
    seeds = (
        " Lines are means over seeds; bands reach from the least to the most." if several else ""
    )
    parts = [
        '<!doctype html><html lang="en"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>FoMoE: {escape(title)}</title><style>{_STYLE}</style></head><body>",
        f"<h1>{escape(title)}</h1>",
        f"<p>Made by fomoe {__version__} from the records of "
        f"{_count(sum(len(g.runs) for g in groups), 'run')}.{seeds}</p>",
        "<h2>Results</h2>",
        _table(*(_rank_results if _fine_tunes(groups) else _results)(groups)),
        '<h2>Figures</h2><div class="figures">',
    ]
    for _, text, drawing in drawn:
        parts.append(f"<figure>{drawing.svg()}<figcaption>{escape(text)}</figcaption></figure>")
    parts.append("</div>")
    if len(groups) > 1:
        parts += ["<h2>Options that differ</h2>", _table(*_differing(groups))]
    parts += ["<h2>Runs</h2>", _table(*_environments(groups)), "<h2>Configuration</h2>"]
    for group in groups:
        text = escape(group.first.config.to_yaml())
        name = escape(group.name)
        parts.append(f"<details><summary>{name}</summary><pre>{text}</pre></details>")
    return "\n".join([*parts, "</body></html>"]) + "\n"


# ------------------------------------------------------------------------------------------ tables


def _results(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    columns = (
        "run merged_loss local_loss executed skipped tokens tokens/s payload/round vs_DiLoCo "
        "vs_DDP state/site peak_memory"
    )
    rows = []
    for group in groups:
        done = [run.summary for run in group.runs if run.summary]
        if len(done) < len(group.runs):
            rounds = min(len(run.rounds) for run in group.runs)
            done_text = f"not finished: {rounds} of {group.first.config.rounds} rounds"
            rows.append([group.name, done_text, *[""] * 10])
            continue
        first = done[0]
        local = [[x for x in s["val_loss_local"] if x is not None] for s in done]
        rows.append(
            [
                group.name,
                spread_text([s["val_loss_merged"] for s in done], ".4f"),
                spread_text([mean(x) for x in local], ".4f") if all(local) else "-",
                spread_text([s["executed_fraction"] for s in done], ".3f"),
                spread_text([s["skipped_fraction"] for s in done], ".3f"),
                f"{first['tokens']:,}",
                spread_text([s["tokens_per_s"] for s in done], ",.0f"),
                bytes_text(first["payload_bytes_per_site_per_round"]),
                times_text(first["ratio_vs_diloco"]),
                times_text(first["ratio_vs_ddp"]),
                bytes_text(first["memory_bytes_per_site"]),
                bytes_text(max(s["peak_memory_bytes"] for s in done)),
            ]
        )
    return [name.replace("_", " ") for name in columns.split()], rows


def _rank_results(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    done = {g.name: [run.summary for run in g.runs if run.summary] for g in groups}
    whole = {g.name: done[g.name] if len(done[g.name]) == len(g.runs) else [] for g in groups}
    return result_rows(whole)


def _differing(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    trees = [flatten(group.first.config.model_dump(mode="json")) for group in groups]
    names = list(dict.fromkeys(name for tree in trees for name in tree))
    rows = [
        [name, *(_word(tree.get(name, "-")) for tree in trees)]
        for name in names
        if len({_word(tree.get(name, "-")) for tree in trees}) > 1 and name != "run.dir"
    ]
    return ["option", *(group.name for group in groups)], rows


def _environments(groups: list[Group]) -> tuple[list[str], list[list[str]]]:
    runs = [(group.name, run) for group in groups for run in group.runs]
    found = {name for _, run in runs for name in _environment(run)}
    names = sorted(found, key=lambda name: (name not in ("fomoe", "python", "torch"), name))
    rows = [
        [name, str(run.config.seed), str(run.folder), _sites(run)]
        + [str(_environment(run).get(item) or "-") for item in names]
        for name, run in runs
    ]
    return ["run", "seed", "folder", "records of sites", *names], rows


def _environment(run: RunRecords) -> Record:
    return (run.summary or {}).get("environment", {})


def _sites(run: RunRecords) -> str:
    missing = set(range(run.config.num_sites)) - set(run.sites)
    return f"all {run.config.num_sites}" if not missing else f"without {sorted(missing)}"


def _table(head: list[str], rows: list[list[str]]) -> str:
    cells = "".join(f"<th>{escape(name)}</th>" for name in head)
    body = ""
    for row in rows:
        named = zip(head, row, strict=True)
        # A narrow screen shows a row as a list, each cell with its column's name.
        texts = (f'<td data-name="{escape(n)}">{escape(cell)}</td>' for n, cell in named)
        body += f"<tr>{''.join(texts)}</tr>"
    return f'<div class="wide"><table><tr class="head">{cells}</tr>{body}</table></div>'


def _word(value: Any) -> str:
    return yaml_word(value) if value is None or isinstance(value, bool) else str(value)


def _count(number: int, word: str) -> str:
    return f"{number} {word}{'' if number == 1 else 's'}"
