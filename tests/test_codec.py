"""Low bits between sites: error bounds, error feedback, equal replicas, planned bytes, resume."""

from __future__ import annotations

import json

import pytest
import torch
from conftest import (
    LAYOUTS,
    all_good,
    assert_same_bits,
    make_run,
    one_round,
    over_gloo,
    parameters_of,
    tiny_config,
)
from helpers_cli import fomoe, load_part, trained, write_config

from fomoe.codecs import BLOCK, CODECS
from fomoe.config import SyncConfig
from fomoe.errors import SyncError
from fomoe.planning import plan_run
from fomoe.segments import Bucket, Segment
from fomoe.sync import codec as room
from fomoe.sync.buckets import Contribution
from fomoe.sync.codec import decode, encode
from fomoe.sync.coder import Coder
from fomoe.sync.exchange import mean_over_holders
from fomoe.sync.transport import InMemoryTransport
from fomoe.training import run_local_steps, synchronize
from fomoe_sim.evaluate import answer_one
from fomoe_sim.options import Ask
from fomoe_sim.question import build

LOSSY = [name for name, codec in CODECS.items() if codec.lossy]
SIZES = [0, 1, 2, 3, 127, 128, 129, 130, 255, 256, 257, 1000]
LEVELS = {"int8": 127, "int4": 7}


def random_values(numel: int, seed: int = 0) -> torch.Tensor:
    """Blocks of very different size."""
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(-60, 60, (-(-numel // BLOCK),), generator=generator)
    return torch.randn(numel, generator=generator) * 2.0 ** sizes.repeat_interleave(BLOCK)[:numel]


def there_and_back(values: torch.Tensor, name: str) -> torch.Tensor:
    return decode(encode(values, CODECS[name]), values.numel(), CODECS[name])


# ------------------------------------------------------------------------------------------- codes


def test_the_option_offers_the_table():
    assert SyncConfig.model_fields["codec"].annotation.__args__ == tuple(CODECS)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("numel", SIZES)
def test_encoded_bytes_are_the_planned_ones(name, numel):
    encoded = encode(random_values(numel), CODECS[name])
    assert encoded.dtype == torch.uint8
    assert encoded.numel() == CODECS[name].num_bytes(numel)
    long = CODECS[name].num_bytes(10**6 * BLOCK) * 8 / 10**6 / BLOCK
    assert long == CODECS[name].mean_bits < 32


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", LEVELS)
def test_an_error_is_at_most_half_a_step_of_its_block(name, numel):
    values = random_values(numel)
    found = there_and_back(values, name)
    for start in range(0, numel, BLOCK):
        block, own = values[start : start + BLOCK], found[start : start + BLOCK]
        step = float(block.abs().max()) / LEVELS[name] * (1 + 2**-7)  # rounded up to bf16
        assert (own - block).abs().max() <= step / 2 * (1 + 1e-6)
        assert own.isfinite().all()


def test_bf16_keeps_eight_bits():
    values = random_values(1000)
    assert ((there_and_back(values, "bf16") - values).abs() <= values.abs() * 2**-8).all()


@pytest.mark.parametrize("numel", SIZES)
@pytest.mark.parametrize("name", LEVELS)
def test_multiples_of_a_step_come_back_to_the_bit(name, numel):
    generator = torch.Generator().manual_seed(1)
    levels, num_blocks = LEVELS[name], -(-numel // BLOCK)
    codes = torch.randint(-levels, levels + 1, (numel,), generator=generator)
    codes[::BLOCK] = levels * (2 * torch.randint(0, 2, (num_blocks,), generator=generator) - 1)
    steps = torch.randn(num_blocks, generator=generator).abs().to(torch.bfloat16).float()
    values = codes * steps.repeat_interleave(BLOCK)[:numel]
    assert torch.equal(there_and_back(values, name), values)


@pytest.mark.parametrize("name", LOSSY)
def test_zeros_stay_zeros_and_tiny_or_huge_values_stay_finite(name):
    values = torch.zeros(3 * BLOCK)
    values[BLOCK:].uniform_(-1e-40, 1e-40, generator=torch.Generator().manual_seed(2))
    values[2 * BLOCK] = -3.3e38
    found = there_and_back(values, name)
    assert (found[:BLOCK] == 0).all()
    assert (found - values)[BLOCK : 2 * BLOCK].abs().max() <= 2.0**-127
    assert found.isfinite().all()
    assert float(found[2 * BLOCK]) == pytest.approx(-3.3e38, rel=2**-7)


@pytest.mark.parametrize("name", LOSSY)
@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_what_is_not_finite_never_decodes_to_a_number(name, bad):
    """Its whole block says so, and no other one."""
    values = random_values(3 * BLOCK + 5)
    values[BLOCK + 7] = bad
    found = there_and_back(values, name)
    assert not found[BLOCK + 7].isfinite()
    assert found[:BLOCK].isfinite().all()
    assert found[2 * BLOCK :].isfinite().all()
    if name in LEVELS:
        assert found[BLOCK : 2 * BLOCK].isnan().all()


@pytest.mark.parametrize("name", LEVELS)
def test_a_block_does_not_depend_on_what_is_encoded_beside_it(name, monkeypatch):
    values = random_values(10 * BLOCK + 9)
    whole = encode(values, CODECS[name])
    assert torch.equal(torch.cat([encode(b, CODECS[name]) for b in values.split(BLOCK)]), whole)
    monkeypatch.setattr(room, "_PIECE", 3 * BLOCK)
    assert torch.equal(encode(values, CODECS[name]), whole)
    again = decode(whole, values.numel(), CODECS[name])
    monkeypatch.undo()
    assert torch.equal(decode(whole, values.numel(), CODECS[name]), again)


# ---------------------------------------------------------------------------------------- feedback


def three_holders(*sizes: int) -> Bucket:
    everyone = (0, 1, 2)
    segments = tuple(
        Segment(f"p{i}", f"p{i}", (n,), 0, n, False, None, None, everyone, everyone, 0)
        for i, n in enumerate(sizes)
    )
    return Bucket(index=4, holders=everyone, trainers=everyone, is_expert=False, segments=segments)


def one_mean(bucket, coder, values, weights):
    """The mean of the sites' values [3, numel]; weights are by site and segment."""

    def contribute(bucket, site):
        starts = [0]
        for segment in bucket.segments:
            starts.append(starts[-1] + segment.numel)
        first = {s.name: start for s, start in zip(bucket.segments, starts, strict=False)}
        return Contribution(
            bucket,
            weights[site],
            lambda s, start, stop: values[site][first[s.name] + start : first[s.name] + stop],
        )

    (mean,) = mean_over_holders(InMemoryTransport(range(3)), [bucket], contribute, coder).values()
    return mean


@pytest.mark.parametrize("weights", [[[1.0]] * 3, [[3.0], [1.0], [0.5]]])
@pytest.mark.parametrize("name", LOSSY)
def test_the_mean_of_many_rounds_is_exact_under_feedback(name, weights):
    """What is missing after 60 syncs is what one of them left out; without feedback it adds up."""
    bucket = three_holders(300)
    values = torch.randn(3, 300, generator=torch.Generator().manual_seed(3))
    total = sum(w[0] for w in weights)
    true = sum(v.double() * w[0] for v, w in zip(values, weights, strict=True)) / total
    coder = Coder(CODECS[name], [bucket], range(3))
    missing = {"kept": torch.zeros(300).double(), "lost": torch.zeros(300).double()}
    worst = []
    for _ in range(60):
        missing["kept"] += one_mean(bucket, coder, values, weights) - true
        coder.commit()
        missing["lost"] += (
            one_mean(bucket, Coder(CODECS[name], [bucket], range(3)), values, weights) - true
        )
        worst.append(float(missing["kept"].abs().max()))
    step = float(values.abs().max()) / LEVELS.get(name, 127)
    assert max(worst) <= 2 * step, "a step at the contributor and one at the owner"
    assert max(worst[30:]) <= 1.5 * max(worst[:30])
    assert float(missing["lost"].abs().max()) > 5 * max(worst)


@pytest.mark.parametrize("name", LOSSY)
def test_who_contributes_nothing_sends_nothing_and_keeps_what_it_owes(name):
    bucket = three_holders(200, 90)
    values = torch.randn(3, 290, generator=torch.Generator().manual_seed(4))
    coder = Coder(CODECS[name], [bucket], range(3))
    one_mean(bucket, coder, values, [[1.0, 1.0]] * 3)
    coder.commit()
    before = {site: coder.state_of(site)["residual/4"].clone() for site in range(3)}
    assert all(kept.abs().max() > 0 for kept in before.values())
    mean = one_mean(bucket, coder, values, [[0.0, 1.0], [0.0, 1.0], [0.0, 0.0]])
    coder.commit()
    assert (mean[:200] == 0).all()
    for site in range(3):
        after = coder.state_of(site)["residual/4"]
        assert torch.equal(after[:200], before[site][:200])
        # Site 2 sends the means of the rest, to which the others contribute.
        assert not torch.equal(after[200:], before[site][200:])


def test_a_sync_that_is_not_committed_leaves_no_residual():
    bucket = three_holders(150)
    values = torch.randn(3, 150, generator=torch.Generator().manual_seed(5))
    coder = Coder(CODECS["int4"], [bucket], range(3))
    first = one_mean(bucket, coder, values, [[1.0]] * 3)
    coder.discard()
    coder.commit()
    assert all((kept == 0).all() for site in range(3) for kept in coder.state_of(site).values())
    assert torch.equal(one_mean(bucket, coder, values, [[1.0]] * 3), first)


# -------------------------------------------------------------------------------------------- runs

CODED = {
    **{f"cyclic, {name}": {"sync.codec": name} for name in LOSSY},
    "tokens": {"sync.codec": "int8", "sync.weight": "tokens", "placement.replication_factor": 3},
    **{
        f"{layout}, int4": {**LAYOUTS[layout], "sync.codec": "int4"}
        for layout in ("router rows", "uneven", "spes", "copies, apart")
    },
    "copies, coupled": {
        **LAYOUTS["copies, one holder"],
        "placement.couple": 0.5,
        "sync.codec": "int8",
    },
}


@pytest.mark.parametrize("case", CODED)
def test_all_holders_take_the_same_and_a_proxy_run_gives_the_same_bits(case):
    """Parameters, anchors, outer state and residuals; bytes are those planned."""
    config = tiny_config(CODED[case])
    plan = plan_run(config)

    def work(transport):
        run = make_run(config, transport)
        hashes = [one_round(run, round_idx) for round_idx in range(2)]
        states = {(s, n): t for s in run.sites for n, t in run.sync.state_of(s).items()}
        counts = {s: run.transport.counts[s].state() for s in run.sites}
        return hashes, parameters_of(run) | states, counts

    results = all_good(over_gloo(config.num_sites, work))
    hashes, everything, counts = work(InMemoryTransport(range(config.num_sites)))
    assert_same_bits({k: v for _, own, _ in results for k, v in own.items()}, everything)
    for site, (own_hashes, _, own_counts) in enumerate(results):
        assert all(
            own.items() <= every.items() for own, every in zip(own_hashes, hashes, strict=True)
        )
        planned = [plan.traffic_of_sync(site, (r + 1) * config.local_steps) for r in range(2)]
        for own in (own_counts[site], counts[site]):
            assert own["payload"]["shared"] == sum(t.payload_shared for t in planned)
            assert own["wire"].get("shared", 0) == sum(t.wire_shared for t in planned)
            assert own["payload"].get("expert", 0) == sum(t.payload_expert for t in planned)
            assert own["wire"].get("expert", 0) == sum(t.wire_expert for t in planned)
    residuals = [t for (_, name), t in everything.items() if name.startswith("residual/")]
    assert any(t.abs().max() > 0 for t in residuals)


def test_an_expert_that_one_site_holds_is_not_encoded():
    """Nothing of it crosses: it moves as in fp32."""
    found = {}
    for name in ("fp32", "int4"):
        run = make_run(tiny_config(placement__replication_factor=1, sync__codec=name))
        one_round(run)
        found[name] = parameters_of(run)
    experts = [key for key in found["fp32"] if ".experts." in key[1]]
    assert_same_bits(*({key: own[key] for key in experts} for own in found.values()))
    shared = (0, "embedding.weight")
    assert not torch.equal(found["fp32"][shared], found["int4"][shared])


def test_a_value_too_large_for_the_codec_is_found_before_it_is_a_parameter():
    """Finite in fp32 and infinite in bf16; no site takes it."""
    run = make_run(tiny_config(sync__codec="bf16", outer__lr=1e-30))
    run_local_steps(run, 0)
    with torch.no_grad():
        run.sites[1].parameters["embedding.weight"][3, 2] = -3.4e38
    before = parameters_of(run)
    with pytest.raises(SyncError, match="anchors are not finite"):
        synchronize(run)
    assert_same_bits(parameters_of(run), before)
    assert all((t == 0).all() for s in run.sites for t in run.sync.lanes.state_of(s).values())


@pytest.mark.parametrize("codec", ["bf16", "int4"])
def test_a_resume_goes_on_to_the_bit(tmp_path, codec):
    """With the residuals, without which it would not."""
    config = write_config(tmp_path)
    words = [f"sync.codec={codec}", "local_steps=1"]
    straight, broken = tmp_path / "straight", tmp_path / "broken"
    trained(config, *words, "rounds=3", f"run.dir={straight}")
    trained(config, *words, "rounds=2", f"run.dir={broken}")
    outcome = fomoe("train", config, *words, "rounds=3", f"run.dir={broken}", "--resume")
    assert outcome.status == 0, outcome.err
    for site in range(3):
        own, expected = (load_part(run, 3, site)[0] for run in (broken, straight))
        assert_same_bits(own, expected)
        assert any(name.startswith("residual/") for name in own)
    refused = fomoe("train", config, "sync.codec=int8", f"run.dir={broken}", "--resume")
    assert refused.status == 1
    assert f"sync.codec (was {codec}, now int8)" in refused.err


@pytest.mark.parametrize("name", CODECS)
def test_dry_run_run_and_cost_model_say_the_same_bytes(tmp_path, name):
    config = write_config(tmp_path)
    words = [config, f"sync.codec={name}", "rounds=1", "local_steps=1"]
    dry = json.loads(fomoe("train", *words, "--dry-run", "--json").out)
    ended = trained(*words)
    keys = [f"{kind}_bytes_per_site_per_round" for kind in ("payload", "wire")]
    for key in keys:
        assert dry[key] == ended[key]
        assert dry[f"{key}_by_site"] == ended[f"{key}_by_site"]
    coded = config.with_name("coded.yaml")
    coded.write_text(f"{config.read_text()}sync: {{codec: {name}}}\n")
    asked = answer_one(build(Ask(config=str(coded)), "fomoe"))
    for key in keys:
        assert asked[f"{key}_by_site"] == ended[f"{key}_by_site"]
    assert asked["bits"] == CODECS[name].mean_bits
    assert asked["needs"] == "runs today"
    left_out = asked["memory_parts"].get("error feedback", {"bytes": 0})["bytes"]
    memory = plan_run(tiny_config(sync__codec=name)).memory[0]
    assert (left_out > 0) == (memory.residuals > 0) == CODECS[name].lossy
