"""A page of tables from the lines of studies; text around its sections is kept (no torch)."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

from fomoe.amounts import bytes_text
from fomoe.config import Config
from fomoe.errors import ConfigError, say_line
from fomoe.files import write_text_atomically
from fomoe.study.figure import Shown, draw
from fomoe.study.plan import Arm, Study
from fomoe.study.ranks import Tried, ranks_tables
from fomoe.study.results import Line, newest, read_results

_COLUMNS = (
    *("arm", "seeds", "merged loss", "lead over control", "sites' own"),
    *("expert FLOPs per token", "in all", "state per site", "payload per round", "note"),
)
_SENT = "sent per token"  # of a study about bytes, instead of the FLOPs in all


@dataclass(frozen=True, kw_only=True)
class Row:
    """One arm in one regime.

    Attributes:
        losses: merged loss by seed.
        lead: the control's loss minus this arm's, for each seed that both have.
        curves: merged loss by bytes that a site has sent, for each seed.
        local: mean of the sites' own losses, over seeds.
        token_flops, flops: forward FLOPs of routed experts, per token and of the whole run.
        memory, payload: bytes per site; and per round.
        sent: bytes that all sites have sent over the run, per token trained on.
    """

    arm: Arm
    losses: dict[int, float]
    lead: tuple[float, ...] = ()
    curves: tuple[dict[float, float], ...] = ()
    local: float | None = None
    token_flops: float = 0.0
    flops: float = 0.0
    memory: float = 0.0
    payload: float = 0.0
    sent: float = 0.0


def write_page(path: Path, studies: Sequence[Study]) -> None:
    """Write or renew a section per study; whatever else is on the page stays as it is.

    Raises:
        ConfigError: if the page cannot be read, or a section on it is not ended.
        CheckpointError: if it cannot be written.
    """
    try:
        page = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    except (OSError, ValueError) as error:
        raise ConfigError("--report", path, f"cannot be read: {error}") from None
    for study in studies:
        page = put_section(page, study.name, section(study, path), path)
    write_text_atomically(path, page)


def put_section(page: str, name: str, text: str, path: Path | str) -> str:
    """The page with this study's section replaced, or added at its end.

    Raises:
        ConfigError: if the section's end is missing.
    """
    start, end = f"<!-- study {name}", f"<!-- end of study {name} -->"
    head = f"{start}: `fomoe study --report` writes what stands before its end -->"
    own = f"{head}\n\n{text.strip()}\n\n{end}"
    found = re.search(rf"^{re.escape(start)}:.*$", page, re.MULTILINE)
    if found is None:
        return f"{page.rstrip()}\n\n{own}\n"
    stop = page.find(end, found.end())
    if stop < 0:
        raise ConfigError("--report", path, f"has no line {end}")
    return page[: found.start()] + own + page[stop + len(end) :]


def section(study: Study, page: Path) -> str:
    """The Markdown of one study; its figure goes beside the page if matplotlib is there."""
    lines = read_results(study.results)
    parts = [f"## {study.title}", study.question.strip()]
    used: list[Line] = []
    if study.runs[0].config.adapters.base is not None:
        for regime in study.regimes:
            by_arm = _lines_by_arm(study, regime, lines)
            used += [line for own in by_arm.values() for line in own.values()]
            parts += [f"### {regime}"] * bool(regime)
            parts += ranks_tables(study, [Tried(arm, by_arm[arm.name]) for arm in study.arms])
        return _ended(parts, study, lines, used)
    tables: dict[str, list[Row]] = {}
    for regime in study.regimes:
        own, rows = _rows(study, regime, lines)
        used += own
        tables[regime] = rows
        parts += [f"### {regime}"] * bool(regime)
        parts.append(_table(rows, study.figure))
    parts.append(_legend(study))
    if used:
        figure = page.with_name(f"{page.stem}-{study.name}.svg")
        of = _curves if study.figure == "bytes" else _points
        panels = {name: shown for name, rows in tables.items() if (shown := of(rows))}
        if panels and draw(figure, study.title, study.figure, panels):
            what = {"bytes": "bytes that a site has sent", "flops": "expert FLOPs of the run"}
            parts.append(f"![Merged loss over {what[study.figure]}]({figure.name})")
    return _ended(parts, study, lines, used)


def _ended(parts: Sequence[str], study: Study, lines: Sequence[Line], used: Sequence[Line]) -> str:
    """A section with the origin of its figures."""
    if older := len(lines) - len(used):
        say_line(f"{study.results}: {older} lines left out: of other configs, or not the newest")
    return "\n\n".join(part for part in (*parts, _origin(study, used)) if part)


def _points(rows: list[Row]) -> list[Shown]:
    """Arms with results, where their control has some, over their FLOPs."""
    by_name = {row.arm.name: row for row in rows}
    return [
        Shown(row.arm.name, [row.flops / control.flops], [[x] for x in row.losses.values()])
        for row in rows
        if row.losses and (control := by_name[row.arm.control]).flops
    ]


def _curves(rows: list[Row]) -> list[Shown]:
    """Arms that send something, over the bytes of the rounds that every seed has evaluated."""
    shown = []
    for row in rows:
        sent = [set(curve) for curve in row.curves]
        xs = sorted(set.intersection(*sent)) if sent else []
        if xs and xs[-1] > 0:
            shown.append(Shown(row.arm.name, xs, [[own[x] for x in xs] for own in row.curves]))
    return shown


# ------------------------------------------------------------------------------------------ tables


def _rows(study: Study, regime: str, lines: Sequence[Line]) -> tuple[list[Line], list[Row]]:
    """The lines that count in a regime, and a row per arm."""
    by_arm = _lines_by_arm(study, regime, lines)
    rows = []
    for arm in study.arms:
        own, control = by_arm[arm.name], by_arm[arm.control]
        row = Row(arm=arm, losses={seed: line["val_loss_merged"] for seed, line in own.items()})
        if own:
            found = list(own.values())
            local = [x["val_loss_local"] for x in found if x["val_loss_local"] is not None]
            row = Row(
                arm=arm,
                losses=row.losses,
                lead=tuple(
                    control[seed]["val_loss_merged"] - loss
                    for seed, loss in row.losses.items()
                    if seed in control
                ),
                curves=tuple(dict(line["curve"]) for line in found),
                local=fmean(local) if local else None,
                token_flops=fmean(map(expert_flops, found)),
                flops=fmean(expert_flops(line) * line["tokens"] for line in found),
                memory=fmean(line["memory_bytes_per_site"] for line in found),
                payload=fmean(line["payload_bytes_per_site_per_round"] for line in found),
                sent=fmean(map(sent_per_token, found)),
            )
        rows.append(row)
    return [line for own in by_arm.values() for line in own.values()], rows


def _lines_by_arm(study: Study, regime: str, lines: Sequence[Line]) -> dict[str, dict[int, Line]]:
    """The newest line of every run of a regime, by arm and seed."""
    by_arm: dict[str, dict[int, Line]] = {arm.name: {} for arm in study.arms}
    for run in study.runs:
        line = newest(lines, run) if run.regime == regime else None
        if line is not None:
            by_arm[run.arm][run.seed] = line
    return by_arm


def expert_flops(line: Line) -> float:
    """Forward FLOPs per token in routed experts: gate, up and down projection, 2 per parameter.

    A dense model counts the FFN of the same active width, without the shared expert's part.
    """
    model = Config.model_validate(_known_model(line)).model
    layers = model.num_layers - model.num_dense_layers
    full = 2 * 3 * layers * model.d_model * model.top_k * model.expert_ffn_dim
    return full * line["expert_flops_fraction"]


def sent_per_token(line: Line) -> float:
    """Payload bytes of all sites over the run, per token that they trained on."""
    config = line["config"]
    sites, rounds = config["num_sites"], config["rounds"]
    return line["payload_bytes_per_site_per_round"] * sites * rounds / line["tokens"]


def _known_model(line: Line) -> dict[str, Any]:
    names = ("num_layers", "num_dense_layers", "d_model", "top_k", "expert_ffn_dim")
    return {"model": {name: line["config"]["model"][name] for name in names}}


def _table(rows: list[Row], about: str) -> str:
    """The arms with results, and a line that names the others."""
    by_name = {row.arm.name: row for row in rows}
    run = [row for row in rows if row.losses]
    if not run:
        return "No arm has been run."
    names = [_SENT if about == "bytes" and name == "in all" else name for name in _COLUMNS]
    head = ["| " + " | ".join(names) + " |", "|" + "---|" * len(names)]
    table = "\n".join([*head, *(_table_row(row, by_name[row.arm.control], about) for row in run)])
    others = ", ".join(row.arm.name for row in rows if not row.losses)
    return table + (f"\n\nNot run: {others}." if others else "")


def _table_row(row: Row, control: Row, about: str) -> str:
    is_control = row is control
    cells = [
        f"**{row.arm.name}**" if is_control else row.arm.name,
        str(len(row.losses)),
        mean_text(list(row.losses.values())),
        "control" if is_control else mean_text(row.lead, signed=True),
        "-" if row.local is None else f"{row.local:.4f}",
        _ratio(row.token_flops, control.token_flops),
        f"{row.sent:.3g} B" + (f", {row.sent / control.sent:.3g}x" if control.sent else "")
        if about == "bytes"
        else _ratio(row.flops, control.flops),
        _with_ratio(row.memory, control.memory),
        _with_ratio(row.payload, control.payload),
        row.arm.note.replace("|", "\\|"),
    ]
    return "| " + " | ".join(cells) + " |"


def mean_text(values: Sequence[float], *, signed: bool = False) -> str:
    """Mean and sample standard deviation; one value has no spread."""
    if not values:
        return "-"
    mean = f"{fmean(values):+.4f}" if signed else f"{fmean(values):.4f}"
    return f"{mean} ± {stdev(values):.4f}" if len(values) > 1 else mean


def _ratio(value: float, control: float) -> str:
    return f"{value / control:.2f}x" if control else "-"


def _with_ratio(count: float, control: float) -> str:
    return f"{bytes_text(count)}" + (f", {_ratio(count, control)}" if control else "")


def _legend(study: Study) -> str:
    configs = [run.config for run in study.runs]
    tokens = {c.rounds * c.local_steps * each for c in configs for each in c.tokens_per_step}
    numbers = " or ".join(f"{count:,}" for count in sorted(tokens))
    return (
        "Losses are nats per token of held-out text: the mean over seeds ± the standard "
        "deviation. The lead is the control's loss minus the arm's on the same seed (positive: "
        "the arm is better), and its spread is over these differences. FLOPs are those of routed "
        "experts that ran, per token and in all (x tokens of all sites), against the control "
        "(bold), as are the state and the payload of a site. Every site trains on "
        f"{numbers} tokens."
    )


def _origin(study: Study, used: Sequence[Line]) -> str:
    """The command, and what the lines say of the code and the text that made them."""
    more = "".join(f" '{word}'" for word in study.more)
    text = f"`fomoe study {study.path}{more}`, lines in `{study.results}`."
    for what, name in (
        ("torch", "torch"),
        ("Python", "python"),
        ("Code", "commit"),
        ("Text", "text_sha256"),
    ):
        # Of a hash, 13 characters: a commit of 12 may have a sign after it.
        values = sorted({str(line[name])[:13] for line in used if line.get(name)})
        text += f" {what}: {', '.join(values)}." if values else ""
    texts: dict[tuple[str, int], set[str]] = {}
    for line in used:
        place = (line["regime"] or "", line["seed"])
        texts.setdefault(place, set()).add(line.get("text_sha256") or "")
    for (regime, seed), found in texts.items():
        if len(found) > 1:
            where = f"seed {seed}" + f" of {regime}" * bool(regime)
            text += f" **The arms of {where} did not all read the same text.**"
    return text
