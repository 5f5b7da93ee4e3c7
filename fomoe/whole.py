"""The whole model of a saved round, read from the sites' parts one tensor at a time.

No site holds it; each parameter is taken from its first holder when it is asked for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fomoe.checkpoint import Part, has_manifest, read_values, round_folder, saved_rounds
from fomoe.config import Config
from fomoe.copies import num_sets, set_of_site
from fomoe.errors import CheckpointError, ConfigError
from fomoe.files import listing
from fomoe.planning import RunPlan, plan_run
from fomoe.remains import differences, parse_saved
from fomoe.segments import Segment
from fomoe.shapes import parameter_specs
from fomoe.state import Layout, entry, misfit
from fomoe.sync.replicas import replica_hashes
from fomoe.textchoice import NUM_COUNTERS

_ATTEMPTS = 20


@dataclass(frozen=True, kw_only=True)
class WholeModel:
    """The merged model of one round.

    Attributes:
        run_dir, round_idx: where it was found, and the rounds done.
        plan: the experiment, and who holds what.
        parts: the part of every site.
        shapes: of every tensor, in the model's order. Every routed expert is a tensor of its own,
            and a selection bias follows its router.
        sources: per tensor, the sites and entries that its rows are read from.
    """

    run_dir: Path
    round_idx: int
    plan: RunPlan
    parts: tuple[Part, ...]
    shapes: dict[str, tuple[int, ...]]
    sources: dict[str, list[tuple[int, str]]]

    @property
    def config(self) -> Config:
        return self.plan.config

    @property
    def fingerprints(self) -> dict[str, Any]:
        """Hashes of the run's tokenizer and data."""
        kept = self.parts[0].values.get("fingerprints")
        return kept if isinstance(kept, dict) else {}

    def read(self, name: str) -> Tensor:
        """One tensor, in fp32 on the CPU."""
        rows = [self.parts[site].read(own) for site, own in self.sources[name]]
        return rows[0] if len(rows) == 1 else torch.cat(rows)

    def text_counts(self) -> Tensor:
        """n-grams counted at the sites of each set of copies, int64 [G, N]."""
        counts_GN = torch.zeros(num_sets(self.config), NUM_COUNTERS, dtype=torch.int64)
        for site, part in enumerate(self.parts):
            counts_GN[set_of_site(self.config, site)] += part.read(entry("text", "counts"))
        return counts_GN

    def refuse_copies(self, what: str) -> None:
        """Raises ConfigError if tokens choose their experts by the text, which `what` cannot do."""
        if num_sets(self.config) > 1:
            raise ConfigError("placement.kind", "copies", f"{what}; fomoe merge writes the model")

    def refuse_adapters(self, what: str) -> None:
        """Raises ConfigError if the run has trained adapters on a base, which `what` cannot do."""
        if self.config.adapters.base is not None:
            rule = f"{what}; fomoe export --adapter writes them, --merge the model with them"
            raise ConfigError("run", self.run_dir, rule)


def open_whole(
    run_dir: Path,
    asked: int | None,
    say: Callable[[str], None] = lambda line: None,
    *,
    check: bool = True,
) -> WholeModel:
    """The requested round, or the newest whole one.

    A live run saves rounds and removes old ones meanwhile: then the search starts again.

    Args:
        run_dir: a run's folder, with the parts of all sites.
        asked: rounds done; None: the newest that is complete.
        say: called with a line that says why a newer round is refused.
        check: read all parts once and compare hashes and replicas; else only the parts that are
            read later are checked, then.

    Raises:
        CheckpointError: if no round is complete, naming what is missing.
    """
    if not run_dir.is_dir():
        raise CheckpointError(f"{run_dir} is not a run's folder")
    for _ in range(_ATTEMPTS):
        rounds = saved_rounds(run_dir)
        if asked is not None and asked not in rounds:
            raise CheckpointError(f"{run_dir} has no checkpoint of round {asked}, only {rounds}")
        refused: list[str] = []
        for candidate in rounds if asked is None else [asked]:
            try:
                whole = open_round(run_dir, candidate, check=check)
            except CheckpointError as error:
                refused.append(str(error))
                if saved_rounds(run_dir) != rounds:
                    break
                continue
            for problem in refused:
                say(f"refused: {problem}")
            return whole
        else:
            of_round = "" if asked is None else f" of round {asked}"
            reason = f": {refused[0]}" if refused else ""
            raise CheckpointError(f"{run_dir} holds no complete checkpoint{of_round}{reason}")
    raise CheckpointError(
        f"{run_dir} saves and removes rounds faster than they are read: {refused[0]}; a larger "
        f"run.keep_checkpoints keeps them longer"
    )


def open_round(run_dir: Path, round_idx: int, *, check: bool = True) -> WholeModel:
    """Open the parts of all sites, and check that they are of one run.

    Raises:
        CheckpointError: naming the first site whose part cannot be used, and why.
    """
    first = read_values(run_dir, round_idx, _any_site(run_dir, round_idx))
    config = parse_saved(first["config"])
    if config is None:
        raise CheckpointError(f"{round_folder(run_dir, round_idx)}: its config is damaged")
    for site in range(config.num_sites):
        if not has_manifest(run_dir, round_idx, site):
            Part(run_dir, round_idx, site)  # says what is missing
    plan = plan_run(config)
    shared = plan.replicas(round_idx * config.local_steps)
    kinds = {s.name: kind for s, kind in merged_kinds(plan)}
    hashes: dict[int, bytes] = {}
    parts = []
    for site in range(config.num_sites):
        part = Part(run_dir, round_idx, site, check=check)
        layout = _layout(plan, site)
        own = {name: tensor for name, tensor in part.kept.items() if name in layout}
        problem = differences(part.values, config, first.get("fingerprints"))
        problem = problem or misfit(own, layout)
        if check and not problem and config.sync.verify_replicas:
            for index, digest in replica_hashes(shared, site, _reader(part, kinds)).items():
                if hashes.setdefault(index, digest) != digest:
                    problem = "its replicas are not those of the other sites"
        if problem:
            where = round_folder(run_dir, round_idx)
            raise CheckpointError(f"checkpoint {where}, site {site}: {problem}")
        parts.append(part)
    shapes, sources = _tensors(plan)
    return WholeModel(
        run_dir=run_dir,
        round_idx=round_idx,
        plan=plan,
        parts=tuple(parts),
        shapes=shapes,
        sources=sources,
    )


def merged_kinds(plan: RunPlan) -> Iterator[tuple[Segment, str]]:
    """Every segment that someone trains, and the kind of entry that has its merged value."""
    for bucket in plan.segment_plan.buckets:
        if bucket.trainers:
            for segment in bucket.segments:
                yield segment, plan.merged_kind(bucket)


def _reader(part: Part, kinds: dict[str, str]) -> Callable[[Segment], Tensor]:
    return lambda segment: part.read(entry(kinds[segment.name], segment.name))


def _layout(plan: RunPlan, site: int) -> Layout:
    """Parameters, and the selection biases that are the same at all sites, of one site's part."""
    layout: Layout = {
        entry(own, segment.name): (segment.shape, torch.float32)
        for segment, kind in merged_kinds(plan)
        if site in segment.holders
        for own in {"param", kind}
    }
    if num_sets(plan.config) > 1:
        layout[entry("text", "counts")] = ((NUM_COUNTERS,), torch.int64)
    for layer in biased_layers(plan.config):
        shape = (plan.config.model.num_experts,)
        layout[entry("router", "balance_bias", layer)] = (shape, torch.float32)
    return layout


def biased_layers(config: Config) -> tuple[int, ...]:
    """Layers whose router has a selection bias in the merged model."""
    return config.model.moe_layers if config.router.balance != "loss" else ()


def bias_name(layer: int) -> str:
    """Name of a layer's selection bias in the merged model."""
    return f"layers.{layer}.moe.router.balance_bias"


def _tensors(plan: RunPlan) -> tuple[dict[str, tuple[int, ...]], dict[str, list[tuple[int, str]]]]:
    """Shapes of the merged model's tensors, and where their rows are."""
    found: dict[str, list[tuple[Segment, str]]] = {}
    for segment, kind in merged_kinds(plan):
        name = segment.name if segment.is_expert else segment.parameter
        found.setdefault(name, []).append((segment, kind))
    shapes: dict[str, tuple[int, ...]] = {}
    sources: dict[str, list[tuple[int, str]]] = {}
    biased = biased_layers(plan.config)
    for spec in parameter_specs(plan.config):
        rows = range(spec.shape[0])
        names = [spec.row_name(e) for e in rows] if spec.kind == "expert" else [spec.name]
        for name in filter(found.__contains__, names):  # what nobody trains is not saved
            shapes[name] = spec.shape[1:] if spec.kind == "expert" else spec.shape
            pieces = sorted(found[name], key=lambda piece: piece[0].start)
            sources[name] = [(s.holders[0], entry(kind, s.name)) for s, kind in pieces]
        if spec.kind == "router" and spec.layer in biased:
            name = bias_name(spec.layer)
            shapes[name] = (spec.shape[0],)
            sources[name] = [(0, entry("router", "balance_bias", spec.layer))]
    return shapes, sources


def _any_site(run_dir: Path, round_idx: int) -> int:
    """A site whose part is present; the files of some sites may not have been copied yet."""
    names = listing(round_folder(run_dir, round_idx))
    manifests = [name for name in names if name.endswith(".manifest.json")]
    numbers = [name.removeprefix("site-").split(".")[0] for name in manifests]
    return min((int(number) for number in numbers if number.isdigit()), default=0)
