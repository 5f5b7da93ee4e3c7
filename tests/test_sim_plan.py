"""`fomoe plan`: what it keeps, why, and configs that the trainer's loader accepts."""

from __future__ import annotations

import json

import pytest
import yaml

from fomoe.cli import main
from fomoe.load import load_config
from fomoe.placement import build_placement
from fomoe.rules import check_ranks
from fomoe_sim.cluster import uniform_cluster
from fomoe_sim.options import Ask
from fomoe_sim.plan import Constraints, search
from fomoe_sim.trainconfig import start_line

THREE = "configs/clusters/three-sites.yaml"
QUESTION = ["--cluster", THREE, "--model", "100b-moe", "--tokens", "2e12", "--budget", "5e6"]


def plan(capsys, *flags):
    assert main(["plan", *flags, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def refusal(capsys, *flags):
    assert main(["plan", *flags]) in (1, 2)
    lines = capsys.readouterr().err.strip().splitlines()
    assert len(lines) == 1
    return lines[0]


def test_the_best_meets_the_constraints_and_nothing_beats_it(capsys):
    found = plan(capsys, *QUESTION)
    best = found["best"]
    assert best["fits"]
    assert best["cost_usd"] <= 5e6
    assert best["executed_fraction"] >= 0.5
    assert best["cost_usd"] == min(row["cost_usd"] for row in found["pareto"])
    names = ("days", "cost_usd", "local_steps", "executed_fraction")
    scores = [[row[name] for name in names] for row in found["pareto"]]
    for one in scores:
        better = [o for o in scores if o != one and o[3] >= one[3]]
        assert not any(all(a <= b for a, b in zip(o[:3], one[:3], strict=True)) for o in better)


def test_it_says_what_binds(capsys):
    assert main(["plan", *QUESTION]) == 0
    text = capsys.readouterr().out
    assert "binding resource:" in text
    assert "one-site, the same accelerators" in text
    assert "cheapest diloco" in text


def test_a_trainable_plan_becomes_a_config(capsys, tmp_path):
    out = tmp_path / "plan.yaml"
    flags = ["--model", "proxy-54m", "--sites", "3", "--trainable", "--out", str(out)]
    assert main(["plan", *flags]) == 0
    config = load_config(out)
    assert config.num_sites == 3
    assert config.model.num_experts == 8
    assert build_placement(config).num_sites == 3


@pytest.mark.parametrize(("bits", "codec"), [("4", "int4"), ("8.125", "int8"), ("16", "bf16")])
def test_a_plan_of_few_bits_names_its_codec(capsys, tmp_path, bits, codec):
    out = tmp_path / "plan.yaml"
    flags = ["--model", "proxy-54m", "--method", "fomoe", "--bits", bits, "--out", str(out)]
    assert main(["plan", *flags]) == 0
    assert load_config(out).sync.codec == codec
    capsys.readouterr()
    assert "sync at these bits" in refusal(capsys, *flags[:4], "--bits", "0.11", "--trainable")
    every = ["--model", "proxy-54m", "--method", "ddp", "--max-local-steps", "1"]
    assert "sync at these bits" in refusal(capsys, *every, "--bits", bits, "--trainable")


def test_a_search_takes_the_bits_that_the_codecs_send():
    assert {row["bits"] for row in found(trainable=True)} == {32.0, 8.125, 4.125}


@pytest.mark.parametrize(("ours", "option"), [("full", "layers"), ("experts", "experts")])
def test_recomputation_is_the_trainers_own(capsys, tmp_path, ours, option):
    out = tmp_path / "plan.yaml"
    flags = ["--model", "proxy-54m", "--recompute", ours, "--trainable", "--out", str(out)]
    assert main(["plan", *flags]) == 0
    assert load_config(out).model.recompute == option
    capsys.readouterr()
    selective = plan(capsys, "--model", "proxy-54m", "--recompute", "selective")
    assert "recomputation (selective)" in selective["missing"]


def test_a_layout_that_is_not_trained_is_named(capsys):
    flags = ["--cluster", THREE, "--model", "olmoe-1b-7b"]
    missing = " ".join(plan(capsys, *flags)["missing"])
    assert "the layout" in missing
    assert "numbers of accelerators" not in missing


def test_sites_of_unequal_numbers_of_accelerators_are_trained(capsys, tmp_path):
    """A shipped cluster: each site's states are sharded over all of its own."""
    out = tmp_path / "plan.yaml"
    assert main(["plan", "--cluster", THREE, "--model", "olmoe-1b-7b", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    config, text = load_config(out), out.read_text()
    assert config.inner.parallel == "fsdp"
    for site, count in enumerate((128, 64, 128)):
        check_ranks(config, count, site)
        line = f"at site {site}: torchrun --nnodes {count // 8} --nproc-per-node 8 "
        assert line in printed
        assert line in text
        assert f" --site {site} --meet SITE0_ADDRESS" in text
    (again,) = " ".join(printed.split()).split("again: ")[1:]
    words = again.split(" wrote ")[0].split()
    assert "cp=1,ep=1,pp=1,shard=all,tp=1,zero=3" in words
    assert words[words.index("--batch-tokens") + 1] == str(2**23)  # every accelerator has some
    assert main(["project", *words[2:], "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["needs"] == "runs today"


def test_a_step_that_is_too_small_is_refused_where_it_is_given(capsys):
    flags = ["--cluster", THREE, "--model", "olmoe-1b-7b", "--trainable"]
    text = refusal(capsys, *flags, "--batch-tokens", "4e6")
    assert "128 of them take 95 sequences with cp 1, ep 1, pp 1, shard all, tp 1, zero 3" in text


def test_sites_of_as_many_accelerators_are_trained(capsys, tmp_path):
    """With states sharded over all of a site's; another layout is named."""
    out = tmp_path / "plan.yaml"
    flags = ["--model", "olmoe-1b-7b", "--sites", "4", "--accelerators", "8"]
    assert main(["plan", *flags, "--trainable", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "cp=1,ep=1,pp=1,shard=8,tp=1,zero=3" in printed
    assert printed.endswith(f"at every site: launch/site.sh SITE 4 SITE0_ADDRESS {out} --ranks 8\n")
    config = load_config(out)
    assert config.inner.parallel == "fsdp"
    check_ranks(config, 8)
    line = f"launch/site.sh SITE 4 SITE0_ADDRESS {out} --ranks 8"
    assert line in out.read_text()
    wide = plan(capsys, *flags, "--parallel", "tp=2")["missing"]
    assert any(gap.startswith("the layout tp2") for gap in wide)
    every = refusal(capsys, *flags, "--method", "ddp", "--max-local-steps", "1", "--trainable")
    assert "gradients averaged between sites of several accelerators" in every


def test_sites_of_unequal_speed_get_unequal_batches(capsys, tmp_path):
    """A trainable plan divides the step by speed, and its config says so to both programs."""
    cluster, out = tmp_path / "mixed.yaml", tmp_path / "plan.yaml"
    sites = [{"name": n, "accelerator": n, "count": 2, "link": "1Gbit"} for n in ("H100", "A100")]
    cluster.write_text(yaml.safe_dump({"name": "mixed", "sites": sites}))
    flags = ["--model", "proxy-54m", "--cluster", str(cluster), "--batch-tokens", "65536"]
    assert main(["plan", *flags, "--trainable", "--out", str(out)]) == 0
    config = load_config(out)
    check_ranks(config, 2)
    fast, slow = config.tokens_per_step
    assert 1.7 < fast / slow < 2.7
    assert config.sync.weight == "tokens"
    assert sum(config.tokens_per_step) == pytest.approx(65536, rel=0.2)
    capsys.readouterr()
    assert main(["project", "--config", str(out), "--cluster", str(cluster), "--json"]) == 0
    row = json.loads(capsys.readouterr().out)
    assert row["tokens_per_step_by_site"] == [fast, slow]
    assert row["needs"] == "runs today"
    assert plan(capsys, *flags, "--split", "equal", "--trainable")["best"]["days"] > 0


@pytest.mark.parametrize(
    ("count", "words"),
    [
        (1, "launch/site.sh SITE 2 SITE0_ADDRESS p.yaml"),
        (64, "torchrun --nnodes 8 --nproc-per-node 8 "),
        (12, "torchrun --nnodes 2 --nproc-per-node 6 "),
        (13, "torchrun --nnodes 13 --nproc-per-node 1 "),
    ],
)
def test_a_plan_says_how_its_sites_start(count, words):
    """A site of more accelerators than a machine has starts a torchrun on each machine."""
    links = {"up_bps": 1e9, "down_bps": 1e9, "price": None}
    sites = uniform_cluster(2, accelerator="H100", count=count, **links).sites
    line = start_line("p.yaml", sites)
    assert line.startswith(f"at every site: {words}")
    if count > 8:
        given = line.split(" train ")[1].split()
        assert given == ["p.yaml", "--site", "SITE", "--meet", "SITE0_ADDRESS"]


def found(trainable=False, method="diloco", **more):
    """The rows that a question searches."""
    asked = Ask(model="olmoe-1b-7b", accelerators=1, batch_tokens=float(2**20), **more)
    candidates, _ = search(asked, Constraints(method=method), trainable=trainable)
    return [candidate.row for candidate in candidates]


def test_a_stated_step_time_has_one_recomputation():
    assert {row["recompute"] for row in found(trainable=True, step_time=1.0)} == {"none"}
    assert {row["recompute"] for row in found(trainable=True)} <= {"none", "experts", "full"}


def test_streaming_has_fragments_and_overlap_to_choose_from():
    for method, fragments in (("streaming", {6}), ("diloco", {1, 6})):
        rows = found(method=method)
        assert {row["fragments"] for row in rows} == fragments
        assert {row["overlap_steps"] for row in rows} == {0, 1}


def test_a_plan_keeps_to_stated_capacities(capsys, tmp_path):
    cluster = tmp_path / "small.yaml"
    site = "accelerator: H200, count: 64, link: 10Gbit"
    cluster.write_text(f"sites: [{{name: a, {site}}}, {{name: b, {site}, capacity: 4}}]")
    flags = ["--cluster", str(cluster), "--model", "mixtral-8x7b"]
    assert plan(capsys, *flags)["best"]["method"] in ("fomoe", "fsdp")
    assert "capacity refuses" in refusal(capsys, *flags, "--method", "diloco")


def test_capacity_placement_survives_the_config(capsys, tmp_path):
    cluster = tmp_path / "uneven.yaml"
    site = "accelerator: H100, link: 10Gbit, count: 1"
    cluster.write_text(
        f"sites: [{{name: a, {site}, capacity: 6}}, {{name: b, {site}, capacity: 4}}]"
    )
    out = tmp_path / "plan.yaml"
    flags = ["--cluster", str(cluster), "--model", "proxy-54m", "--method", "fomoe"]
    flags += ["--trainable", "--min-executed", "0.65"]
    assert main(["plan", *flags, "--out", str(out)]) == 0
    placement = build_placement(load_config(out))
    assert [placement.num_residents(site) for site in range(2)] == [6, 4]


def test_a_shape_the_trainer_lacks_is_named(capsys, tmp_path):
    out = str(tmp_path / "plan.yaml")
    flags = ["--model", "deepseek-v3", "--sites", "8", "--accelerators", "64", "--out", out]
    assert main(["plan", *flags, "--bandwidth", "100Gbit"]) == 2
    assert "latent attention (MLA)" in capsys.readouterr().err


def test_coverage_risk_asks_for_replicas(capsys):
    flags = ["--model", "100b-moe", "--sites", "8", "--method", "fomoe", "--min-executed", "0.1"]
    loose = plan(capsys, *flags)["best"]
    strict = plan(capsys, *flags, "--max-coverage-risk", "0.001")["best"]
    assert loose["replication_factor"] < strict["replication_factor"]
    assert strict["coverage_loss_probability"] <= 0.001


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        ([*QUESTION[:-1], "1"], "budget refuses"),
        ([*QUESTION, "--deadline-days", "0.001"], "deadline refuses"),
        (["--model", "deepseek-v3", "--sites", "2", "--accelerators", "8"], "memory refuses"),
        ([*QUESTION, "--local-steps", "500"], "exceeds --max-local-steps"),
        ([*QUESTION, "--out", "no/such/folder/plan.yaml"], "a folder that does not exist"),
        ([*QUESTION, "--min-executed", "2"], "must be at most 1"),
        (["--config", "x.yaml"], "plan starts from --model"),
    ],
)
def test_bad_or_impossible_questions_are_one_line(capsys, flags, words):
    assert words in refusal(capsys, *flags)
