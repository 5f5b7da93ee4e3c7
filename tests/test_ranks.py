"""Sites of several ranks: the same training, bytes and checkpoints as with one rank."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from conftest import LAYOUTS, tiny_config
from helpers_cli import fomoe, tiny_tree
from helpers_ranks import Command, World, worlds
from safetensors.torch import load_file
from torch.utils._pytree import tree_leaves

from fomoe import checkpoint
from fomoe.checkpoint import Part, check_part, remove_parts, round_folder, save_part
from fomoe.errors import CheckpointError, ConfigError
from fomoe.launch import launch_from_environment, launch_of_site
from fomoe.load import load_config
from fomoe.memory import SiteMemory
from fomoe.model.transformer import Transformer
from fomoe.planning import plan_run, planned_summary
from fomoe.rules import check_ranks
from fomoe.shards import common_rows, lanes_between, rank_rows
from fomoe.sync.inside import open_outputs

# ------------------------------------------------------------------------------------- the plan


@pytest.mark.parametrize(("rows", "ranks"), [(8, 2), (7, 3), (5, 4), (2, 4), (1, 3), (9, 4)])
def test_rows_are_those_of_torchs_chunks(rows: int, ranks: int) -> None:
    """`fully_shard` cuts as `torch.chunk` does."""
    chunks = [chunk.tolist() for chunk in torch.arange(rows).chunk(ranks)]
    found = [list(range(*rank_rows(rows, rank, ranks))) for rank in range(ranks)]
    assert [own for own in found if own] == chunks


@pytest.mark.parametrize("ranks", [(2, 1), (3, 2), (2, 2), (1, 4, 3), (1, 1)])
@pytest.mark.parametrize("rows", [1, 2, 7, 8, 9, 24])
def test_lanes_are_the_ranks_that_have_a_row(rows: int, ranks: tuple[int, ...]) -> None:
    """Every row is in one lane; a rank that has none is in one nevertheless."""

    def rank_of(row: int, number: int) -> int:
        spans = [rank_rows(rows, rank, number) for rank in range(number)]
        return next(rank for rank, (first, stop) in enumerate(spans) if first <= row < stop)

    lanes = lanes_between([rows], ranks)
    assert lanes[0] == (0,) * len(ranks)
    assert lanes == sorted(set(lanes))
    found: list[int] = []
    for lane in lanes:
        own = range(*common_rows(rows, lane, ranks))
        assert all(tuple(rank_of(row, n) for n in ranks) == lane for row in own)
        found += own
    assert found == list(range(rows))
    for site, number in enumerate(ranks):
        assert {lane[site] for lane in lanes} == set(range(number))
    if len(set(ranks)) == 1:
        assert lanes == [(rank,) * len(ranks) for rank in range(ranks[0])]


# Copies of experts, and gradients averaged at every step, are trained with one rank per site.
CUT = [name for name in LAYOUTS if not name.startswith("copies")]


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", CUT)
def test_every_element_is_exchanged_by_one_rank(name: str, parallel: str) -> None:
    config = tiny_config(LAYOUTS[name], inner__parallel=parallel)
    whole, run = plan_run(config), plan_run(config, 3)
    for bucket in whole.segment_plan.buckets:
        parts: dict[str, list[tuple[int, int]]] = {s.name: [] for s in bucket.segments}
        for rank in run.of_site(0):
            for own in rank.segment_plan.buckets:
                if own.index == bucket.index:
                    assert (own.holders, own.trainers) == (bucket.holders, bucket.trainers)
                    for segment in own.segments:
                        assert segment.cut is not None
                        assert segment.shape[0] == segment.cut[1] - segment.cut[0]
                        parts[segment.name].append(segment.cut)
        for segment in bucket.segments:
            found = parts[segment.name]
            edges = [0, *(stop for _, stop in found)]
            assert [start for start, _ in found] == edges[:-1]
            assert edges[-1] == segment.shape[0]
    # In fp32 the payload does not depend on the number of ranks.
    for site in range(config.num_sites):
        assert run.payload_per_round(site) == whole.payload_per_round(site)
        assert run.wire_per_round(site) == sum(
            own.wire_per_round(site) for own in run.of_site(site)
        )


@pytest.mark.parametrize("parallel", ["fsdp", "ddp"])
@pytest.mark.parametrize("name", [name for name in CUT if name != "single"])
def test_lanes_have_every_row_of_their_ranks_once(name: str, parallel: str) -> None:
    """Also where a rank has several: the bytes are those of one rank per site."""
    config = tiny_config(LAYOUTS[name], inner__parallel=parallel)
    counts = tuple(1 + site % 3 for site in range(config.num_sites))
    whole, run = plan_run(config), plan_run(config, counts)
    for site, number in enumerate(counts):
        assert len(run.of_site(site)) == number
        for rank, own in enumerate(run.of_site(site)):
            assert own.num_ranks == counts
            rows: dict[tuple[int, str], list[tuple[int, int]]] = {}
            for lane_number, lane in own.lanes.items():
                for bucket in lane.buckets:
                    assert bucket.lane == lane_number
                    for segment in bucket.segments:
                        assert segment.cut is not None
                        rows.setdefault((bucket.index, segment.name), []).append(segment.cut)
            held = {(b.index, s.name): s for b in own.segment_plan.buckets for s in b.segments}
            assert rows.keys() == held.keys()
            for key, parts in rows.items():
                segment = held[key]
                first, stop = segment.cut or (0, segment.shape[0])
                assert [start for start, _ in parts] == [first, *(end for _, end in parts[:-1])]
                assert parts[-1][1] == stop
            assert run.at_rank(site, rank) is own
        assert run.payload_per_round(site) == whole.payload_per_round(site)
        of_ranks = [own.wire_per_round(site) for own in run.of_site(site)]
        assert run.wire_per_round(site) == sum(of_ranks)
    assert run.num_ranks == counts
    assert planned_summary(run)["ranks_per_site_by_site"] == list(counts)


def test_state_falls_as_one_over_the_ranks() -> None:
    """With shards all of it; without, what the outer optimizer keeps."""
    whole = plan_run(tiny_config()).memory[0]
    sharded = plan_run(tiny_config(inner__parallel="fsdp"), 2)
    copied = plan_run(tiny_config(inner__parallel="ddp"), 2)
    steps = 4 * len({s.parameter for s in sharded.site_plan.segments_at(0)})
    assert sharded.memory[0].total == whole.total + steps  # every rank counts its steps
    for own in sharded.of_site(0):
        assert own.memory[0].total == pytest.approx(whole.total / 2, rel=0.02)
    for own in copied.of_site(0):
        for kind in ("parameters", "gradients", "inner_optimizer"):
            assert getattr(own.memory[0], kind) == getattr(whole, kind)
        assert own.memory[0].anchor == pytest.approx(whole.anchor / 2, rel=0.02)
    summary = planned_summary(sharded)
    assert summary["ranks_per_site"] == 2
    assert summary["memory_bytes_per_rank_by_site"][0] == sharded.at_rank(0, 0).memory[0].total


REFUSED: list[tuple[dict[str, Any], int, str]] = [
    ({}, 2, "inner.parallel none must be fsdp or ddp for the 2 ranks of a site"),
    ({"inner.parallel": "ddp"}, 3, "inner.batch_size 2 must be a multiple of 3"),
    ({"inner.parallel": "ddp", "method": "ddp"}, 2, "sync.average gradients is trained with one"),
    (
        {"inner.parallel": "ddp", "sync.overlap_steps": 1, "local_steps": 4},
        2,
        "sync.overlap_steps 1 must be 0 for the 2 ranks of a site with inner.parallel ddp",
    ),
    (
        {"inner.parallel": "ddp", "sync.fragments": 2},
        2,
        "sync.fragments 2 must be 1 for the 2 ranks of a site with inner.parallel ddp",
    ),
    (
        {"inner.parallel": "ddp", "method": "copies"},
        2,
        "placement.kind copies is trained with one rank per site",
    ),
    (
        {"inner.parallel": "fsdp", "inner.batch_size": 3, "model.d_model": 16},
        3,
        "model.d_model 16 gives experts 16 rows, which the 3 ranks of a site cannot share equally",
    ),
]


@pytest.mark.parametrize(("options", "ranks", "message"), REFUSED)
def test_what_ranks_cannot_train_is_refused(
    options: dict[str, Any], ranks: int, message: str
) -> None:
    config = tiny_config(options)
    check_ranks(config, 1)
    with pytest.raises(ConfigError, match="^" + message):
        check_ranks(config, ranks)


# ------------------------------------------------------------------------------------ the launch

STORE = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}


def test_ranks_of_a_site_follow_one_another() -> None:
    found = [
        launch_from_environment(
            {"RANK": str(rank), "WORLD_SIZE": "6", **STORE}, num_sites=2, ranks=(3,)
        )
        for rank in range(6)
    ]
    assert [(own.site, own.rank) for own in found] == [(s, r) for s in range(2) for r in range(3)]
    assert {(own.num_sites, own.ranks) for own in found} == {(2, 3)}
    assert [own.first for own in found] == [True, *[False] * 5]


@pytest.mark.parametrize(
    ("given", "ranks", "message"),
    [
        ({}, (0,), "--ranks-per-site 0 must be at least 1"),
        ({}, (2, 0), "--ranks-per-site 2,0 must be at least 1"),
        ({}, (2,), "--ranks-per-site 2 needs a process per rank: start it with torchrun"),
        ({}, (2, 1, 1), "--ranks-per-site 2,1,1 must be one number, or one for each site: num_si"),
        (
            {"RANK": "0", "WORLD_SIZE": "2", **STORE},
            (2,),
            r"WORLD_SIZE 2 must be num_sites x --ranks-per-site = 2 x 2",
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "4", **STORE},
            (2, 1),
            r"WORLD_SIZE 4 must be the sum of --ranks-per-site 2,1, which is 3",
        ),
    ],
)
def test_a_wrong_number_of_processes_is_refused(
    given: dict[str, str], ranks: tuple[int, ...], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        launch_from_environment(given, num_sites=2, ranks=ranks)


def test_every_site_may_have_its_own_number_of_ranks() -> None:
    found = [
        launch_from_environment(
            {"RANK": str(rank), "WORLD_SIZE": "6", **STORE}, num_sites=3, ranks=(2, 1, 3)
        )
        for rank in range(6)
    ]
    places = [(own.site, own.rank, own.ranks) for own in found]
    assert places == [(0, 0, 2), (0, 1, 2), (1, 0, 1), (2, 0, 3), (2, 1, 3), (2, 2, 3)]
    assert {own.num_sites for own in found} == {3}


def test_a_site_may_have_a_torchrun_of_its_own() -> None:
    """RANK and WORLD_SIZE are then those of the site."""
    given = {"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "1", **STORE}
    found = launch_of_site(2, "[fd00::1]:29733", given, num_sites=3)
    assert (found.site, found.num_sites, found.rank, found.ranks) == (2, 3, 1, 2)
    assert found.where == "[fd00::1]:29733"
    assert not found.agent_store
    alone = launch_of_site(0, "host", {}, num_sites=3)
    assert (alone.rank, alone.ranks, alone.where, alone.first) == (0, 1, "host:29500", True)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--site", "2", "--meet", "host"], "--site 2 must be from 0 to 1: num_sites is 2"),
        (["--site", "-1", "--meet", "host"], "--site -1 must be from 0 to 1"),
        (["--site", "0"], "--site 0 needs --meet"),
        (["--meet", "host"], "--meet host needs --site"),
        (["--site", "0", "--meet", "host:x"], "--meet 'host:x' must be an address and a port"),
        (["--site", "0", "--meet", "::1"], "--meet '::1' must be an address and a port"),
        (["--site", "0", "--meet", "host:0"], "--meet host:0 must have a port from 1 to 65535"),
        (
            ["--site", "0", "--meet", "host", "--ranks-per-site", "2"],
            "--ranks-per-site 2 is for one torchrun over all sites",
        ),
    ],
)
def test_a_wrong_site_or_address_is_refused(config: Path, words: list[str], message: str) -> None:
    outcome = fomoe("train", config, *words)
    assert outcome.status == 2
    assert message in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_dry_run_plans_for_ranks(config: Path) -> None:
    words = ["train", config, "--dry-run", "--ranks-per-site", 2]
    outcome = fomoe(*words, "inner.parallel=fsdp")
    assert outcome.status == 0, outcome.err
    assert "2 ranks per site (fsdp); a rank keeps" in outcome.out
    outcome = fomoe(*words)
    assert outcome.status == 2
    assert "inner.parallel none must be fsdp or ddp" in outcome.err


def test_fsdp_finds_every_tensor_of_an_output() -> None:
    """Older releases of torch look for tensors in pytrees only."""
    open_outputs()
    config = tiny_config()
    model = Transformer(config, *(plan_run(config).placement.residents(0),) * 2)
    tokens = torch.zeros(2, 8, dtype=torch.int64)
    output = model(tokens, tokens)
    found = {id(leaf) for leaf in tree_leaves(output)}
    assert id(output.loss) in found
    assert output.stats
    for stats in output.stats.values():
        assert {id(stats.lb_loss), id(stats.z_loss), id(stats.mean_E)} <= found


# ------------------------------------------------------------------------------------- the parts


def save_ranks(folder: Path, *, num_ranks: int = 3) -> torch.Tensor:
    """A tensor of 7 rows as ranks save it, a scalar, and one that the first rank has alone."""
    whole = torch.arange(14.0).view(7, 2)
    for rank in reversed(range(num_ranks)):
        first, stop = rank_rows(7, rank, num_ranks)
        tensors = {"param/a": whole[first:stop], "inner/step/a": torch.tensor(5.0)}
        if rank == 0:
            tensors["rng"] = torch.arange(3)
        save_part(folder, 1, 0, tensors, {"config": {}}, rank=rank, num_ranks=num_ranks)
    return whole


def test_rows_of_all_ranks_are_read_as_one_tensor(tmp_path: Path) -> None:
    whole = save_ranks(tmp_path)
    part = Part(tmp_path, 1, 0)
    assert part.num_ranks == 3
    assert tuple(part.kept["param/a"].shape) == (7, 2)
    assert torch.equal(part.read("param/a"), whole)
    for start in range(7):
        for stop in range(start + 1, 8):
            assert torch.equal(part.read("param/a", (start, stop)), whole[start:stop])
    assert torch.equal(part.read_of_rank("param/a", 1), whole[3:6])
    assert part.read("inner/step/a") == 5
    assert part.read("rng").tolist() == [0, 1, 2]


def test_a_part_is_whole_only_with_every_rank(tmp_path: Path) -> None:
    save_ranks(tmp_path)
    folder = round_folder(tmp_path, 1)
    assert check_part(tmp_path, 1, 0) == ""
    file = folder / "site-0.rank-2.safetensors"
    kept = file.read_bytes()
    file.write_bytes(kept[:-1] + b"x")
    assert "site-0.rank-2.safetensors is torn or was altered" in check_part(tmp_path, 1, 0)
    file.write_bytes(kept)
    (folder / "site-0.rank-1.manifest.json").unlink()
    assert check_part(tmp_path, 1, 0) == "site-0.rank-1.manifest.json is missing"
    with pytest.raises(CheckpointError, match=r"site-0.rank-1.manifest.json is missing"):
        Part(tmp_path, 1, 0)


def test_a_part_of_fewer_ranks_does_not_take_what_others_left(tmp_path: Path) -> None:
    save_ranks(tmp_path)
    whole = save_ranks(tmp_path, num_ranks=2)
    assert check_part(tmp_path, 1, 0) == ""
    assert torch.equal(Part(tmp_path, 1, 0).read("param/a"), whole)
    remove_parts(tmp_path, 1, [0])
    assert not round_folder(tmp_path, 1).exists()


# ------------------------------------------------------------------------------------------ runs


def write_config(folder: Path) -> Path:
    tree = tiny_tree(folder)
    tree |= {"num_sites": 2, "rounds": 2, "router": {"balance": "both", "lb_loss": 0.1}}
    tree["placement"] = {"replication_factor": 1}
    tree["inner"] |= {"batch_size": 4, "accumulation_steps": 2, "clip_norm": 0.5}
    tree["model"]["recompute"] = "layers"
    path = folder / "ranks.yaml"
    path.write_text(yaml.safe_dump(tree, sort_keys=False))
    return path


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_config(tmp_path_factory.mktemp("ranks"))


TWO, FOUR = ("--ranks-per-site", 2), ("--ranks-per-site", 4)
FSDP, DDP = "inner.parallel=fsdp", "inner.parallel=ddp"
PARTS = ("local_steps=4", "sync.fragments=2", "sync.overlap_steps=1", "sync.mix=0.25")
UNEQUAL = ("--ranks-per-site", "2,1")
SIX = ("inner.batch_size=6",)  # which 3 and 2 ranks can share
INT8 = ("sync.codec=int8", "placement.replication_factor=2")


@pytest.fixture(scope="module")
def runs(config: Path) -> dict[str, World]:
    """All runs of this file, one after the other: starting torch takes longer than training."""
    folder = config.parent

    def command(name: str, count: int, *words: object, ranks: int = 0) -> Command:
        own = ["train", config, "--json", f"run.dir={folder / name}", *words]
        return Command(folder / f"{name}.log", count, tuple(own), ranks)

    commands = [
        command("one", 2),
        command("fsdp", 4, FSDP, *TWO),
        command("ddp", 4, DDP, *TWO),
        command("spes", 2, "method=spes"),
        command("spes-fsdp", 4, "method=spes", FSDP, *TWO),
        command("parts", 2, *PARTS),
        command("parts-fsdp", 4, *PARTS, FSDP, *TWO),
        command("short", 4, "rounds=1", FSDP, *TWO),
        command("apart", 4, FSDP, ranks=2),
        command("unequal", 3, FSDP, ranks=2),
        command("unequal-joint", 3, FSDP, *UNEQUAL),
        command("unequal-ddp", 3, DDP, "--ranks-per-site", "1,2"),
        command("unequal-parts", 3, *PARTS, FSDP, *UNEQUAL),
        command("unequal-int8", 3, FSDP, *UNEQUAL, *INT8),
        command("unequal-int8-short", 3, "rounds=1", FSDP, *UNEQUAL, *INT8),
        command("six", 2, *SIX),
        command("crossing", 5, *SIX, DDP, "--ranks-per-site", "3,2"),
        command("int8", 4, FSDP, *TWO, *INT8),
        command("int8-short", 4, "rounds=1", FSDP, *TWO, *INT8),
    ]
    found = dict(zip([c.folder.stem for c in commands], worlds(*commands), strict=True))
    resumed = []
    for name, count, words in (
        ("to-one", 2, ()),
        ("to-two", 4, (FSDP, *TWO)),
        ("to-four", 8, (FSDP, *FOUR)),
        ("to-ddp", 4, (DDP, *TWO)),
        ("to-unequal", 3, (FSDP, *UNEQUAL)),
    ):
        shutil.copytree(folder / "short", folder / name)
        resumed.append(command(name, count, *words, "rounds=2", "--resume"))
    for name, source, count, words in (
        ("int8-two", "int8-short", 4, (FSDP, *TWO)),
        ("int8-one", "int8-short", 2, ()),
        ("int8-unequal", "int8-short", 3, (FSDP, *UNEQUAL)),
        ("unequal-int8-on", "unequal-int8-short", 3, (FSDP, *UNEQUAL)),
    ):
        shutil.copytree(folder / source, folder / name)
        resumed.append(command(name, count, *words, *INT8, "rounds=2", "--resume"))
    found |= zip([c.folder.stem for c in resumed], worlds(*resumed), strict=True)
    return found


def tensors_of(config: Path, name: str, site: int, round_idx: int = 2) -> dict[str, torch.Tensor]:
    part = Part(config.parent / name, round_idx, site)
    return {entry: part.read(entry) for entry in part.kept}


def assert_close(config: Path, left: str, right: str, *, bits: bool = False) -> None:
    for site in range(2):
        one, other = (tensors_of(config, name, site) for name in (left, right))
        assert one.keys() == other.keys()
        for name, tensor in one.items():
            if bits or not tensor.is_floating_point():
                assert torch.equal(tensor, other[name]), name
            else:
                torch.testing.assert_close(tensor, other[name], rtol=1e-4, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", ["fsdp", "ddp"])
def test_two_ranks_train_as_one(runs: dict[str, World], config: Path, name: str) -> None:
    """Losses, counts and the whole state; the balance loss is over the site's whole batch."""
    one, two = runs["one"].summary, runs[name].summary
    for key in ("val_loss_merged", "val_loss_local", "skipped_fraction", "tokens_by_site"):
        assert two[key] == pytest.approx(one[key], abs=1e-5), key
    assert_close(config, "one", name)


@pytest.mark.parametrize("name", ["fsdp", "ddp", "apart", "parts-fsdp"])
def test_nothing_warns(runs: dict[str, World], name: str) -> None:
    assert not [line for err in runs[name].err for line in err.splitlines() if "Warning" in line]


def test_shards_train_as_copies(runs: dict[str, World], config: Path) -> None:
    assert_close(config, "fsdp", "ddp")


def test_sites_with_a_torchrun_each_train_the_same(runs: dict[str, World], config: Path) -> None:
    assert runs["apart"].summary["val_loss_merged"] == runs["fsdp"].summary["val_loss_merged"]
    assert_close(config, "fsdp", "apart", bits=True)


@pytest.mark.parametrize(
    ("name", "as_one"),
    [
        ("unequal", "one"),
        ("unequal-ddp", "one"),
        ("unequal-parts", "parts"),
        ("crossing", "six"),
    ],
)
def test_sites_of_unequal_numbers_of_ranks_train_as_one(
    runs: dict[str, World], config: Path, name: str, as_one: str
) -> None:
    one, other = runs[as_one].summary, runs[name].summary
    for key in ("val_loss_merged", "val_loss_local", "skipped_fraction", "tokens_by_site"):
        assert other[key] == pytest.approx(one[key], abs=1e-5), key
    key = "payload_bytes_per_site_per_round_by_site"
    assert other[key] == one[key]
    assert_close(config, as_one, name)
    assert not [line for err in runs[name].err for line in err.splitlines() if "Warning" in line]


def test_unequal_sites_under_one_torchrun_or_their_own_train_the_same(
    runs: dict[str, World], config: Path
) -> None:
    assert runs["unequal-joint"].summary["ranks_per_site_by_site"] == [2, 1]
    assert_close(config, "unequal", "unequal-joint", bits=True)


@pytest.mark.parametrize("name", ["unequal", "unequal-ddp", "unequal-int8", "crossing"])
def test_replicas_of_unequal_sites_are_identical(
    runs: dict[str, World], config: Path, name: str
) -> None:
    """Their values, and the hashes that the records of both sites have of them."""
    assert runs[name].status == 0
    left, right = (tensors_of(config, name, site) for site in range(2))
    shared = {n for n in left if n.startswith("param/") and ".experts." not in n}
    assert shared
    assert all(torch.equal(left[n], right[n]) for n in shared)
    files = [config.parent / name / file for file in ("metrics.jsonl", "metrics.site1.jsonl")]
    lines = [line for file in files for line in file.read_text().splitlines()]
    rows = [row for row in map(json.loads, lines) if row["kind"] == "round"]
    hashes = {(row["round"], row["site"]): row["replica_hashes"] for row in rows}
    assert hashes[0, 0]
    assert hashes[0, 0] == hashes[0, 1] != hashes[1, 0] == hashes[1, 1]


def test_residuals_of_unequal_sites_go_on(runs: dict[str, World], config: Path) -> None:
    assert_close(config, "unequal-int8", "unequal-int8-on", bits=True)
    refused = runs["int8-unequal"]
    assert refused.status != 0
    text = "its residuals of sync.codec are those of 2 ranks per site, and go on with as many only"
    assert f"{text}, not with 2, 1" in refused.err[0]
    assert "Traceback" not in "".join(refused.err)


def test_frozen_experts_are_sharded_too(runs: dict[str, World], config: Path) -> None:
    assert runs["spes-fsdp"].summary["val_loss_merged"] == pytest.approx(
        runs["spes"].summary["val_loss_merged"], abs=1e-5
    )
    assert_close(config, "spes", "spes-fsdp")


def test_fragments_beside_steps_of_ranks_are_those_of_one(
    runs: dict[str, World], config: Path
) -> None:
    one, two = runs["parts"].summary, runs["parts-fsdp"].summary
    assert two["val_loss_merged"] == pytest.approx(one["val_loss_merged"], abs=1e-5)
    assert two["fragments"] == one["fragments"]
    assert_close(config, "parts", "parts-fsdp")


def test_bytes_are_counted_over_the_ranks(runs: dict[str, World]) -> None:
    """Counted bytes are those planned, and no more than those of one rank."""
    for name in ("fsdp", "ddp", "int8"):
        summary = runs[name].summary
        for kind in ("payload", "wire"):
            assert summary[f"{kind}_bytes_per_site_per_round"] > 0
    one, two = runs["one"].summary, runs["fsdp"].summary
    key = "payload_bytes_per_site_per_round_by_site"
    assert one[key] == two[key]


def test_replicas_are_identical(runs: dict[str, World], config: Path) -> None:
    """All sites and, without shards, all ranks of a site."""
    for name in ("fsdp", "ddp"):
        left, right = (tensors_of(config, name, site) for site in range(2))
        shared = {n for n in left if n.startswith("param/") and ".experts." not in n}
        assert shared
        assert all(torch.equal(left[n], right[n]) for n in shared)
    hashes = [held["hash"] for held in runs["ddp"].held]
    assert hashes[0] == hashes[1]
    assert hashes[2] == hashes[3]
    assert len(set(hashes)) == 2  # experts differ between the sites


def test_a_rank_holds_what_is_planned(runs: dict[str, World], config: Path) -> None:
    tree = yaml.safe_load(config.read_text())
    for name in ("fsdp", "ddp"):
        planned = plan_run(_loaded(tree, name), 2)
        for number, held in enumerate(runs[name].held):
            memory: SiteMemory = planned.at_rank(number // 2, number % 2).memory[number // 2]
            assert held["parameters"] == memory.parameters
            assert held["gradients"] == memory.gradients
            assert held["inner_optimizer"] == memory.inner_optimizer
            assert held["outer"] == memory.anchor + memory.outer_optimizer + memory.residuals
    one, two = runs["one"].held[0], runs["fsdp"].held[0]
    for kind in ("parameters", "gradients", "inner_optimizer", "outer"):
        assert two[kind] == pytest.approx(one[kind] / 2, rel=0.03)


def _loaded(tree: dict[str, Any], parallel: str) -> Any:
    from fomoe.load import build_config

    return build_config(tree | {"inner": tree["inner"] | {"parallel": parallel}})


@pytest.mark.parametrize("name", ["to-one", "to-two", "to-four", "to-ddp", "to-unequal"])
def test_a_run_goes_on_with_another_number_of_ranks(
    runs: dict[str, World], config: Path, name: str
) -> None:
    """With as many it is the straight run to the bit; with others, what is loaded is."""
    assert runs[name].summary["val_loss_merged"] == pytest.approx(
        runs["fsdp"].summary["val_loss_merged"], abs=1e-5
    )
    assert_close(config, "fsdp", name, bits=name == "to-two")
    records = (config.parent / name / "metrics.jsonl").read_text()
    assert records.count('"kind": "round"') == 2


def test_residuals_go_on_with_as_many_ranks_only(runs: dict[str, World], config: Path) -> None:
    assert_close(config, "int8", "int8-two", bits=True)
    refused = runs["int8-one"]
    assert refused.status != 0
    assert "its residuals of sync.codec are those of 2 ranks per site" in refused.err[0]
    assert "Traceback" not in "".join(refused.err)


def test_the_whole_model_is_read_from_the_parts_of_ranks(
    runs: dict[str, World], config: Path
) -> None:
    for name in ("one", "fsdp"):
        assert fomoe("merge", config.parent / name).status == 0
    one, two = (
        load_file(config.parent / name / "merged" / "model.safetensors") for name in ("one", "fsdp")
    )
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, two[name], rtol=1e-4, atol=1e-5)
    outcome = fomoe("eval", config.parent / "fsdp", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["merged"]["loss"] == pytest.approx(
        runs["fsdp"].summary["val_loss_merged"], abs=1e-5
    )
    assert checkpoint.saved_rounds(config.parent / "fsdp") == [2, 1]


# ------------------------------------------------------------------------------------------ memory


def test_a_model_that_does_not_fit_one_rank_trains_on_two(tmp_path: Path) -> None:
    """A rank may add less memory than the state of the whole model, and twice that of its half."""
    tree = tiny_tree(tmp_path)
    tree |= {"num_sites": 1, "rounds": 1, "local_steps": 2, "placement": {"replication_factor": 1}}
    tree["model"] |= {"num_layers": 8, "d_model": 256, "num_experts": 8, "expert_ffn_dim": 512}
    path = tmp_path / "large.yaml"
    path.write_text(yaml.safe_dump(tree))
    config, limit = load_config(path, (FSDP,)), 640 * 10**6
    assert plan_run(config).memory[0].total > limit
    for own in plan_run(config, 2).of_site(0):
        assert own.memory[0].total < 0.55 * limit
    words = ("train", path, "--json", f"run.dir={tmp_path}/run", "--overwrite")
    one, two = worlds(
        Command(tmp_path / "one", 1, words, limit=limit),
        Command(tmp_path / "two", 2, (*words, FSDP, *TWO), limit=limit),
    )
    assert one.status == 1
    assert "out of memory" in one.err[0]
    assert two.summary["tokens"] == 2 * sum(config.tokens_per_step)
