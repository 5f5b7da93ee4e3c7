"""Copies of experts: tied, parted, chosen by the text."""

from __future__ import annotations

import math

import pytest
import torch
from conftest import (
    all_good,
    assert_same_bits,
    make_run,
    named_view,
    one_round,
    over_gloo,
    parameters_of,
    tiny_config,
    whole_model,
)
from helpers_cli import fomoe, records, trained, write_config
from safetensors.torch import load_file

from fomoe.copies import coupling, set_of_site
from fomoe.errors import ConfigError
from fomoe.evaluate import gather_text_counts
from fomoe.sync.transport import model_bytes
from fomoe.textchoice import NGRAM, choose_sets, count_ngrams, ngrams
from fomoe.train import merged_loss, run_local_steps, synchronize

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


def test_a_site_holds_one_set_and_copies_start_equal():
    run = make_run(copies(1))
    for site in run.sites.values():
        assert site.model.moe(0).experts.ids == tuple(range(4 * site.site, 4 * site.site + 4))
        weight = site.model.moe(0).router.weight
        assert all(torch.equal(rows, weight[:4]) for rows in weight.split(4))
        for own in range(4):
            first = named_view(run.sites[0], expert_name(own))
            copy = named_view(site, expert_name(4 * site.site + own))
            assert torch.equal(first, copy)


@pytest.mark.parametrize("r", [1, 2])
def test_tied_copies_are_diloco_with_the_experts_of_one_set(r):
    """Until the copies part nothing differs from training one set at all sites."""
    options = {"outer__lr": 0.7, "rounds": 3}
    tied = make_run(copies(r, placement__grow_at=1.0, **options))
    diloco = make_run(tiny_config({"model.num_experts": 4, "method": "diloco", "outer.lr": 0.7}))
    for round_idx in range(3):
        one_round(tied, round_idx)
        one_round(diloco, round_idx)
    for site in range(4):
        for name, value in named_values(diloco, site).items():
            own = value_of_copy(tied, site, name)
            torch.testing.assert_close(own, value, rtol=0, atol=1e-6)
    assert merged_loss(tied).loss == pytest.approx(merged_loss(diloco).loss, abs=1e-6)


def named_values(run, site: int) -> dict[str, torch.Tensor]:
    return {name: value for (s, name), value in parameters_of(run).items() if s == site}


def value_of_copy(run, site: int, name: str) -> torch.Tensor:
    """The tensor of a site with copies that has a name in the model of one set."""
    first = 4 * set_of_site(run.config, site)
    parts = name.split(".")
    if "experts" in parts:
        parts[4] = str(first + int(parts[4]))
    elif "router" in parts:
        rows = [
            named_view(run.sites[site], f"{name}[{e}:{e + 1}]") for e in range(first, first + 4)
        ]
        return torch.cat(rows)
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
        rows = [
            f"layers.1.moe.router.weight[{4 * i + own}:{4 * i + own + 1}]" for i in range(SETS[r])
        ]
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
    set_payload = sum(b.numel * 4 for b in run.plan.families.experts if 0 in b.holders)
    rows = sum(b.numel * 4 for b in run.plan.segment_plan.buckets if len(b.trainers) == r)
    assert rows > 0
    apart = {1.0: set_payload, 0.5: set_payload * r, 0.0: set_payload * (r - 1)}
    assert sent[3] - sent[0] == apart[config.placement.couple] - set_payload


def test_coupling_follows_the_schedule_and_not_the_rounds():
    config = copies(1, rounds=10, inner__schedule_steps=8, placement__grow_at=0.5)
    assert [coupling(config, steps) for steps in (2, 4, 6, 20)] == [1.0, 1.0, 0.5, 0.5]


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


def test_the_choice_is_that_of_a_plain_loop_and_looks_at_no_later_token():
    tokens = torch.randint(0, 9, (3, 40), generator=torch.Generator().manual_seed(0))
    texts = [
        torch.randint(0, 9, (8, 60), generator=torch.Generator().manual_seed(g)) for g in (1, 2)
    ]
    texts[1] = texts[1] // 2
    counts = torch.stack([count_ngrams(text) for text in texts])
    chosen = choose_sets(counts, tokens)
    assert set(chosen.flatten().tolist()) == {0, 1}
    total = [sum(map(int, c)) for c in counts]
    assert total == [8 * (60 - NGRAM + 1)] * 2
    for row, found in zip(tokens, ngrams(tokens), strict=True):
        evidence = [0.0, 0.0]
        for position in range(len(row)):
            at = int(found[position])
            assert (at >= 0) == (position >= NGRAM - 1)
            if at >= 0:
                mean = [
                    sum(int(c[at]) / t for c, t in zip(counts, total, strict=True)) / 2 * total[0]
                ]
                for g in (0, 1):
                    smooth = counts[g].double() + 0.01
                    smooth = (
                        smooth
                        + 1e-3
                        * sum(c.double() / t for c, t in zip(counts, total, strict=True))
                        / 2
                        * total[0]
                    )
                    evidence[g] += math.log(float(counts[g][at]) + 1e-3 * mean[0] + 0.01)
                    evidence[g] -= math.log(float(smooth.sum()))
            best = int(evidence[1] > evidence[0])
            prefix = row[None, : position + 1]
            assert int(choose_sets(counts, prefix)[0, -1]) == best
    assert torch.equal(choose_sets(counts, tokens[:, :20]), chosen[:, :20])


def test_a_counter_depends_on_the_last_tokens_only():
    tokens = torch.arange(12)[None] % 5
    same = tokens.clone()
    same[0, 0] = 4
    assert torch.equal(ngrams(tokens)[0, NGRAM:], ngrams(same)[0, NGRAM:])
    assert ngrams(tokens)[0, NGRAM - 1] != ngrams(same)[0, NGRAM - 1]


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
        tensors[name] = torch.cat([tensors.pop(f"{name}[{e}:{e + 1}]") for e in range(16)])
    model = whole_model(config, tensors)
    held_out = torch.from_numpy(run.data.held_out)
    inputs, targets = held_out[:, :-1], held_out[:, 1:]
    sets = choose_sets(counts, inputs).flatten()
    scope = torch.zeros(len(sets), 16, dtype=torch.bool)
    for token, own in enumerate(sets.tolist()):
        scope[token, 4 * own : 4 * own + 4] = True
    hidden = model.embed(inputs)
    for layer in range(config.model.num_layers):
        hidden, routing, _ = model.run_layer(layer, hidden, None, scope)
        assert torch.equal(routing.selected_TK // 4, sets[:, None].expand(-1, 2))
    assert merged_loss(run).loss == pytest.approx(
        float(model.loss(hidden, targets).detach()), abs=1e-6
    )
    assert len(set(sets.tolist())) > 1


# ------------------------------------------------------------------------------------- whole runs


def test_a_run_resumes_before_and_after_the_copies_part(tmp_path):
    config = write_config(tmp_path)
    options = ["method=copies", "num_sites=4", "model.num_experts=8", "rounds=4"]
    whole = trained(config, *options, f"run.dir={tmp_path / 'whole'}")
    for stop in (1, 2, 3):
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"placement.replication_factor": 3}, "replication_factor 3 does not divide the 4 sites"),
        ({"model.num_experts": 7}, "model.num_experts 7 must be a multiple of the 2 sets"),
        ({"model.top_k": 5}, "top_k"),
        ({"router.balance": "bias"}, "router.balance bias must be loss"),
        ({"model.ffn": "dense"}, "model.ffn dense must be moe"),
        ({"sync.single_holder": "local"}, "sync.single_holder local must be outer"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigError, match=message):
        tiny_config({"method": "copies"} | options)
