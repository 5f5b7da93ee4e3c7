"""Copies of experts: tied, parted, chosen by the text."""

from __future__ import annotations

import math
import random

import pytest
import torch
from conftest import (
    all_good,
    assert_same_bits,
    make_run,
    make_site,
    named_view,
    one_round,
    over_gloo,
    parameters_of,
    tiny_config,
    whole_model,
)
from helpers_cli import fomoe, records, snapshot, trained, write_config
from safetensors.torch import load_file

from fomoe.config import Config
from fomoe.copies import coupling, rounds_by_coupling, set_of_site
from fomoe.data.dataset import build_data
from fomoe.errors import ConfigError, SyncError
from fomoe.evaluate import gather_text_counts
from fomoe.load import load_config
from fomoe.planning import plan_run, planned_summary
from fomoe.sync.transport import model_bytes
from fomoe.textchoice import choosable_experts, choose_sets, count_ngrams, ngram_length, ngrams
from fomoe.training import merged_loss, run_local_steps, synchronize

PLAIN_MEAN = {"outer.lr": 1.0, "outer.momentum": 0.0}
SETS = {1: 4, 2: 2}  # of four sites


def copies(r: int, *, per_set: int = 4, **options: object):
    """Four sites with `per_set` experts each, at r sites each."""
    own = {
        "method": "copies",
        "placement.replication_factor": r,
        "model.num_experts": per_set * SETS[r],
    }
    return tiny_config(own | {name.replace("__", "."): v for name, v in options.items()})


def expert_name(expert: int, layer: int = 0) -> str:
    return f"layers.{layer}.moe.experts.{expert}.gate_up"


def rows_name(index: int, layer: int = 0) -> str:
    """The router rows of a set."""
    return f"layers.{layer}.moe.router.weight[{4 * index}:{4 * index + 4}]"


def of_one_set(**options: object) -> Config:
    """DiLoCo with the experts of one set: what copies are until they part."""
    return tiny_config({"model.num_experts": 4, "method": "diloco"}, **options)


@pytest.mark.parametrize("r", [1, 2])
def test_a_site_holds_one_set_and_copies_start_equal(r):
    run = make_run(copies(r))
    for index, site in run.sites.items():
        own = set_of_site(run.config, index)
        assert own == index // r
        held = {s.expert for s in site.segments if s.is_expert}
        assert held == set(range(4 * own, 4 * own + 4))
        assert run.plan.placement.residents(index)[0] == tuple(sorted(held))
        assert len(site.model.moe(0).router.weight) == 4
        assert torch.equal(named_view(site, rows_name(own)), named_view(run.sites[0], rows_name(0)))
        for expert in range(4):
            first = named_view(run.sites[0], expert_name(expert))
            assert torch.equal(first, named_view(site, expert_name(4 * own + expert)))


@pytest.mark.parametrize("r", [1, 2])
def test_a_site_stores_and_sends_exactly_what_a_model_of_one_set_does(r):
    run, diloco = plan_run(copies(r)), plan_run(of_one_set())
    assert run.memory == diloco.memory
    assert run.traffic == diloco.traffic
    for site in range(4):
        held = run.segment_plan.numel_at(site)
        assert held == diloco.segment_plan.numel
        assert held == sum(p.numel() for p in make_site(copies(r), site).parameters.values())
    assert run.segment_plan.numel > diloco.segment_plan.numel


@pytest.mark.parametrize("r", [1, 2])
def test_tied_copies_are_diloco_with_the_experts_of_one_set(r):
    """Until the copies part nothing differs from training one set at all sites."""
    tied, diloco = make_run(copies(r, placement__grow_at=1.0)), make_run(of_one_set())
    for round_idx in range(3):
        one_round(tied, round_idx)
        one_round(diloco, round_idx)
    for site in range(4):
        for name, value in named_values(diloco, site).items():
            assert torch.equal(value_of_copy(tied, site, name), value), name
    assert merged_loss(tied).loss == pytest.approx(merged_loss(diloco).loss, abs=1e-6)
    counts = tied.transport.counts, diloco.transport.counts
    for site in range(4):
        assert model_bytes(counts[0][site]) == model_bytes(counts[1][site])


def named_values(run, site: int) -> dict[str, torch.Tensor]:
    return {name: value for (s, name), value in parameters_of(run).items() if s == site}


def value_of_copy(run, site: int, name: str) -> torch.Tensor:
    """The tensor of a site with copies that has a name in the model of one set."""
    first = 4 * set_of_site(run.config, site)
    parts = name.split(".")
    if "experts" in parts:
        parts[4] = str(first + int(parts[4]))
    elif "router" in parts:
        return named_view(run.sites[site], f"{name}[{first}:{first + 4}]")
    return named_view(run.sites[site], ".".join(parts))


@pytest.mark.parametrize("couple", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("r", [1, 2])
def test_an_update_is_the_own_mean_pulled_towards_the_familys(r, couple):
    """With a plain outer step: new = old - ((1 - c) own mean + c family mean), for every copy."""
    options = {"placement.grow_at": 0.0, "placement.couple": couple, "sync.weight": "uniform"}
    run = make_run(
        copies(r, **{k.replace(".", "__"): v for k, v in (options | PLAIN_MEAN).items()})
    )
    old = {name: value.clone() for name, value in run.sync.anchors.values.items()}
    run_local_steps(run, 0)
    local = parameters_of(run)
    synchronize(run)
    for own in range(4):
        names = [expert_name(4 * i + own) for i in range(SETS[r])]
        rows = [rows_name(i, layer=1) for i in range(SETS[r])]
        for family in (names, rows):
            grads = []
            for index, name in enumerate(family):
                holders = [s for s in range(4) if set_of_site(run.config, s) == index]
                grads.append(sum(old[name] - local[s, name] for s in holders) / len(holders))
            mean = sum(grads) / len(grads)
            for name, grad in zip(family, grads, strict=True):
                expected = old[name] - ((1 - couple) * grad + couple * mean)
                for site in run.sites.values():
                    if name in {s.name for s in site.segments}:
                        new = named_view(site, name)
                        torch.testing.assert_close(new, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("options", [{}, {"placement__couple": 0.0}, {"placement__couple": 1.0}])
@pytest.mark.parametrize("r", [1, 2])
def test_counted_bytes_are_those_planned_before_and_after_the_copies_part(r, options):
    """`exchange` refuses a round whose bytes are not planned, so a round that ends has the same."""
    config = copies(r, rounds=4, placement__grow_at=0.5, **options)
    run = make_run(config)
    sent = []
    for round_idx in range(4):
        before, _ = model_bytes(run.transport.counts[0])
        one_round(run, round_idx)
        after, _ = model_bytes(run.transport.counts[0])
        sent.append(after - before)
    assert sent == [run.plan.traffic_of_sync(0, 2 * (i + 1)).payload for i in range(4)]
    assert sum(sent) / 4 == run.plan.payload_per_round(0)
    own = sum(4 * b.numel for b in run.plan.segment_plan.buckets if b.holders == tuple(range(r)))
    assert own == 4 * 2 * (
        4 * 3 * 12 * 16 + 4 * 16
    )  # two layers of 4 experts and their router rows
    apart = {1.0: own, 0.5: own * r, 0.0: own * (r - 1)}
    assert sent[:2] == [sent[0]] * 2
    assert sent[3] - sent[0] == apart[config.placement.couple] - own
    planned = planned_summary(run.plan)["phases"]
    assert [phase["rounds"] for phase in planned] == (
        [4] if config.placement.couple == 1 else [2, 2]
    )
    assert [sent[0], sent[-1]][: len(planned)] == [
        phase["payload_bytes_per_site_per_round"] for phase in planned
    ]


def test_an_update_counts_the_sites_whose_own_copy_was_used():
    """Of the family's mean as of the copy's own; a copy without tokens still follows its family."""
    config = copies(1, placement__grow_at=0.0, outer__lr=1.0, outer__momentum=0.0)
    run = make_run(config)
    run_local_steps(run, 0)
    used = {0: 3, 1: 0, 2: 5, 3: 0}  # assignments of expert 1 of every site's set, in layer 0
    for site, count in used.items():
        run.sites[site].counter.executed_LE[0, 1] = count
    names = {site: expert_name(4 * site + 1) for site in used}
    old = {site: run.sync.anchors.values[name].clone() for site, name in names.items()}
    grads = {site: old[site] - named_view(run.sites[site], name) for site, name in names.items()}
    synchronize(run)
    mean = (grads[0] + grads[2]) / 2
    for site, name in names.items():
        own = grads[site] if used[site] else torch.zeros(())
        new = named_view(run.sites[site], name)
        torch.testing.assert_close(new, old[site] - 0.5 * own - 0.5 * mean)


@pytest.mark.parametrize("r", [1, 2])
def test_replicas_are_compared_over_all_sites_until_the_copies_part(r):
    run = make_run(copies(r, placement__grow_at=0.5, rounds=2))
    hashes = one_round(run, 0)
    assert set(hashes) == {1, *(family.index for family in run.plan.families)}
    with torch.no_grad():
        named_view(run.sites[3], expert_name(4 * (3 // r)))[0] += 1
    with pytest.raises(SyncError, match=r"replicas differ .* at its holders \[0, 1, 2, 3\]"):
        run.sync.check_replicas()
    hashes = one_round(run, 1)  # apart: of the sets alone, which with r = 1 have no replica
    assert len(hashes) == (1 if r == 1 else 5)
    with torch.no_grad():
        named_view(run.sites[3], expert_name(4 * (3 // r)))[0] += 1
    if r == 1:
        run.sync.check_replicas()
    else:
        with pytest.raises(SyncError, match=r"at its holders \[2, 3\]"):
            run.sync.check_replicas()


def test_coupling_follows_the_schedule_and_not_the_rounds():
    config = copies(1, rounds=10, inner__schedule_steps=8, placement__grow_at=0.5)
    assert [coupling(config, steps) for steps in (2, 4, 6, 20)] == [1.0, 1.0, 0.5, 0.5]
    assert rounds_by_coupling(config) == {1.0: 2, 0.5: 8}


def test_rounds_are_counted_as_their_syncs_are_coupled():
    draw = random.Random(0)
    for _ in range(300):
        config = copies(
            1,
            rounds=draw.randint(1, 40),
            local_steps=draw.randint(1, 7),
            inner__schedule_steps=draw.choice([None, draw.randint(1, 300)]),
            placement__grow_at=draw.choice([0.0, 0.1, 0.3, 0.5, 0.7, 1.0, draw.random()]),
            placement__couple=draw.choice([0.0, 0.5, 1.0]),
        )
        found = rounds_by_coupling(config)
        syncs = [(done + 1) * config.local_steps for done in range(config.rounds)]
        shares = [coupling(config, steps) for steps in syncs]
        assert {share: shares.count(share) for share in found} == found
        assert sum(found.values()) == config.rounds


@pytest.mark.parametrize("r", [1, 2])
def test_distributed_sites_and_the_proxy_run_are_equal_to_the_last_bit(r):
    config = copies(r, rounds=2, placement__grow_at=0.5)
    proxy = make_run(config)

    def train(run):
        hashes = [one_round(run, i) for i in range(2)]
        return hashes[-1], parameters_of(run), merged_loss(run).loss

    _, parameters, loss = train(proxy)
    for _, own, own_loss in all_good(over_gloo(4, lambda t: train(make_run(config, t)))):
        assert own_loss == loss
        assert_same_bits(own, {key: parameters[key] for key in own})


# ------------------------------------------------------------------------------ chosen by the text


@pytest.mark.parametrize("length", [1, 4])
def test_the_choice_is_that_of_a_plain_loop_and_looks_at_no_later_token(length):
    def draw(seed: int, *shape: int) -> torch.Tensor:
        return torch.randint(0, 9, shape, generator=torch.Generator().manual_seed(seed))

    tokens, texts = draw(0, 3, 40), [draw(1, 8, 60), draw(2, 8, 60) // 2]
    counts = torch.stack([count_ngrams(text, length) for text in texts])
    total = 8 * (60 - length + 1)
    assert [int(own.sum()) for own in counts] == [total, total]
    smooth = [own.double() + 1e-3 * counts.double().mean(0) + 0.01 for own in counts]
    sums = [float(own.sum()) for own in smooth]
    chosen = choose_sets(counts, tokens, length)
    assert set(chosen.flatten().tolist()) == {0, 1}
    for row, (text, found) in enumerate(zip(tokens, ngrams(tokens, length), strict=True)):
        evidence = [0.0, 0.0]
        for position, at in enumerate(found.tolist()):
            assert (at >= 0) == (position >= length - 1)
            for own in (0, 1) if at >= 0 else ():
                evidence[own] += math.log(float(smooth[own][at]) / sums[own])
            best = int(evidence[1] > evidence[0])
            assert int(chosen[row, position]) == best
            assert int(choose_sets(counts, text[None, : position + 1], length)[0, -1]) == best


def test_a_counter_depends_on_the_last_tokens_only():
    tokens = torch.arange(12)[None] % 5
    same = tokens.clone()
    same[0, 0] = 4
    assert torch.equal(ngrams(tokens, 4)[0, 4:], ngrams(same, 4)[0, 4:])
    assert ngrams(tokens, 4)[0, 3] != ngrams(same, 4)[0, 3]


def test_longer_tokens_are_counted_in_shorter_ngrams(tmp_path):
    path = write_config(tmp_path)
    lengths = {
        "data.tokenizer=byte": 4,
        "model.vocab_size=512": 4,  # rows that no byte uses
        "data.tokenizer=bpe data.bpe_vocab_size=512": 2,
        "data.tokenizer=bpe": 1,
        "data.tokenizer=gpt2 model.vocab_size=50257": 1,
    }
    for words, length in lengths.items():
        assert ngram_length(load_config(path, words.split())) == length


def test_the_merged_model_runs_each_token_through_its_own_set():
    config = copies(1, rounds=1, placement__grow_at=0.0, placement__couple=0.0)
    run = make_run(config)
    one_round(run)
    generator = torch.Generator().manual_seed(0)
    for site in run.sites.values():  # as after more text than a test can train on
        site.text_counts_N.copy_(torch.randint(0, 9, site.text_counts_N.shape, generator=generator))
    counts = gather_text_counts(config, run.sites, run.transport)
    assert torch.equal(counts[2], run.sites[2].text_counts_N)
    tensors = {}
    for site in run.sites.values():
        for segment in site.segments:
            tensors.setdefault(segment.name, site.view(segment).clone())
    for layer in config.model.moe_layers:
        name = f"layers.{layer}.moe.router.weight"
        tensors[name] = torch.cat([tensors.pop(rows_name(i, layer)) for i in range(4)])
    model = whole_model(config, tensors)
    held_out = torch.from_numpy(run.data.held_out)
    inputs, targets = held_out[:, :-1], held_out[:, 1:]
    sets = choose_sets(counts, inputs, 4).flatten()
    scope = torch.zeros(len(sets), 16, dtype=torch.bool)
    for token, own in enumerate(sets.tolist()):
        scope[token, 4 * own : 4 * own + 4] = True
    hidden = model.embed(inputs)
    for layer in range(config.model.num_layers):
        hidden, routing, _ = model.run_layer(layer, hidden, scope_TE=scope)
        assert torch.equal(routing.selected_TK // 4, sets[:, None].expand(-1, 2))
    assert merged_loss(run).loss == pytest.approx(
        float(model.loss(hidden, targets).detach()), abs=1e-6
    )
    assert len(set(sets.tolist())) > 1
    assert torch.equal(choosable_experts(config, counts, inputs), scope)
    assert torch.equal(model(inputs, targets, scope).loss, model.loss(hidden, targets))


def test_a_token_runs_the_experts_that_a_site_of_its_set_would_run():
    """Token by token: the site's own layer on the same input."""
    config = copies(1, rounds=1, placement__grow_at=0.0, placement__couple=0.0)
    run = make_run(config)
    one_round(run)
    tensors = {s.name: site.view(s).clone() for site in run.sites.values() for s in site.segments}
    for layer in config.model.moe_layers:
        name = f"layers.{layer}.moe.router.weight"
        tensors[name] = torch.cat([tensors.pop(rows_name(i, layer)) for i in range(4)])
    model = whole_model(config, tensors)
    x_TD = torch.randn(12, 16, generator=torch.Generator().manual_seed(3))
    sets_T = torch.arange(12) % 4
    scope = sets_T[:, None] == torch.arange(16) // 4
    y_TD, _, stats = model.moe(1)(x_TD, scope_TE=scope)
    assert int(stats.skipped) == 0
    for token, own in enumerate(sets_T.tolist()):
        alone, _, _ = run.sites[own].model.moe(1)(x_TD[token : token + 1])
        torch.testing.assert_close(y_TD[token : token + 1], alone)


# ------------------------------------------------------------------------------------- whole runs


FOUR = ["method=copies", "num_sites=4", "model.num_experts=8", "rounds=4"]


def test_a_run_resumes_before_and_after_the_copies_part(tmp_path):
    config, options = write_config(tmp_path), FOUR
    whole = trained(config, *options, f"run.dir={tmp_path / 'whole'}")
    planned = fomoe("train", config, *options, "--dry-run", "--json").json
    assert planned["phases"][0]["rounds"] == planned["phases"][1]["rounds"] == 2
    assert {key: whole[key] for key in planned} == planned
    for stop in (1, 3):
        folder = f"run.dir={tmp_path / str(stop)}"
        trained(config, *options, f"rounds={stop}", folder)
        resumed = trained(config, *options, folder, "--resume")
        assert resumed["val_loss_merged"] == whole["val_loss_merged"]
        kept = [r["replica_hashes"] for r in records(tmp_path / str(stop), "round")]
        assert kept == [r["replica_hashes"] for r in records(tmp_path / "whole", "round")]
    assert fomoe("merge", tmp_path / "whole").status == 0
    merged = load_file(tmp_path / "whole" / "merged" / "model.safetensors")
    assert merged["text_counts"].shape[0] == 2
    assert int(merged["text_counts"].sum()) > 0
    assert {f"layers.0.moe.experts.{e}.down" for e in range(8)} <= set(merged)
    assert merged["layers.1.moe.router.weight"].shape == (8, 16)
    own = load_config(config, options)
    held_out = torch.from_numpy(build_data(own, range(4)).held_out)
    inputs, targets = held_out[:, :-1], held_out[:, 1:]
    scope = choosable_experts(own, merged["text_counts"], inputs)
    loss = float(whole_model(own, merged)(inputs, targets, scope).loss.detach())
    assert loss == pytest.approx(whole["val_loss_merged"], abs=1e-6)


def test_what_cannot_choose_by_the_text_refuses_a_model_of_copies(tmp_path):
    """It would run the wrong experts without a word."""
    config, run, out = write_config(tmp_path), tmp_path / "run", tmp_path / "out"
    plain = "model.shared_expert_ffn_dim=0"  # mixtral can say it
    trained(config, *FOUR, "rounds=2", plain)
    before = snapshot(tmp_path)
    again = [config, "num_sites=4", plain, f"init_from={run}", f"run.dir={out}"]
    for words, reason in {
        ("export", run, "--out", out): "cannot be exported",
        ("eval", run): "is evaluated by the run itself",
        ("eval", run, "--text", config): "is evaluated by the run itself",
        ("generate", run, "--prompt", "site"): "cannot be exported",
        ("train", *again): "cannot be started from",
        ("train", *again, "method=copies", "model.num_experts=8"): "cannot be started from",
    }.items():
        outcome = fomoe(*words)
        assert outcome.status in (1, 2)
        assert outcome.err.startswith(f"fomoe: error: placement.kind copies {reason}"), outcome.err
        assert outcome.err.count("\n") == 1
        assert snapshot(tmp_path) == before


def test_a_resume_may_not_move_the_parting_over_rounds_that_are_done(tmp_path):
    config, folder = write_config(tmp_path), f"run.dir={tmp_path / 'run'}"
    trained(config, *FOUR, "rounds=3", folder)
    before = snapshot(tmp_path / "run")
    longer = [*FOUR, "inner.schedule_steps=16", folder]
    outcome = fomoe("train", config, *longer, "--resume")
    assert outcome.status != 0
    line = outcome.err.strip().splitlines()[-1]
    assert "inner.schedule_steps 16 moves the round after which the copies part" in line
    assert "inner.schedule_steps=8 keeps it" in line
    assert snapshot(tmp_path / "run") == before
    trained(config, *FOUR, folder, "--resume")


def test_the_dry_run_shows_both_phases(tmp_path):
    outcome = fomoe("train", write_config(tmp_path), *FOUR, "--dry-run")
    assert outcome.status == 0, outcome.err
    assert "2 rounds, copies coupled by 1 " in outcome.out
    assert "2 rounds, copies coupled by 0.5 " in outcome.out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement.replication_factor": 3}, "replication_factor 3 does not divide the 4 sites"),
        ({"model.num_experts": 7}, "model.num_experts 7 must be a multiple of the 2 sets"),
        ({"model.top_k": 5}, "model.top_k 5 exceeds the 4 experts of a set of copies"),
        ({"placement.store": "all"}, "placement.store all must be holders"),
        ({"sync.average": "gradients"}, "sync.average gradients must be parameters"),
        ({"router.balance": "bias"}, "router.balance bias must be loss"),
        ({"model.ffn": "dense"}, "model.ffn dense must be moe"),
        ({"sync.single_holder": "local"}, "sync.single_holder local must be outer"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config({"method": "copies"} | options)
