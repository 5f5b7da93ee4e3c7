"""Sites of unequal batches: means by tokens, the same bits in any process, what is refused."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from conftest import RandomStream, make_run, tiny_config
from helpers_cli import fomoe, load_part, records, tiny_tree, trained, write_config
from helpers_ranks import Command, worlds

from fomoe.checkpoint import Part
from fomoe.errors import ConfigError
from fomoe.load import load_config
from fomoe.rules import check_ranks
from fomoe.sync.ddp import GradientSync
from fomoe.training import run_local_steps, synchronize

BY_SITE = "inner.batch_size_by_site"
UNEQUAL = (f"{BY_SITE}=[4,2,6]", "sync.weight=tokens")

# ------------------------------------------------------------------------------------ the means


class Given(RandomStream):
    """One batch, over and over."""

    def __init__(self, batch: np.ndarray) -> None:
        self._batch = batch

    def next_batch(self, batch_size: int) -> np.ndarray:
        assert batch_size == len(self._batch)
        return self._batch


def test_a_shared_parameter_is_averaged_by_the_tokens_of_each_site() -> None:
    sizes = (6, 1, 2, 3)
    plain = {"outer.lr": 1.0, "outer.momentum": 0.0, "sync.weight": "tokens"}
    run = make_run(tiny_config(plain, inner__batch_size_by_site=sizes))
    steps, _, _ = run_local_steps(run, 0)
    tokens = run.config.data.seq_len * run.config.inner.accumulation_steps
    for site, size in enumerate(sizes):
        assert {r["tokens"] for r in steps if r["site"] == site} == {size * tokens}
    own = [run.sites[site].parameters["embedding.weight"].detach().clone() for site in range(4)]
    expected = sum(size * values for size, values in zip(sizes, own, strict=True)) / sum(sizes)
    counts = synchronize(run)
    assert [counts[site].tokens for site in range(4)] == [
        size * tokens * run.config.local_steps for size in sizes
    ]
    for site in run.sites.values():
        found = site.parameters["embedding.weight"].detach()
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6)
    assert not torch.allclose(sum(own) / 4, expected, rtol=0, atol=1e-5)


def test_ddp_takes_the_gradient_of_all_tokens_together() -> None:
    """One site with the batches of all has the same gradient, but for the balance loss."""
    options = {"router.lb_loss": 0.0, "router.z_loss": 0.0, "inner.clip_norm": 0.0}
    sizes = (3, 1, 4, 2)
    run = make_run(tiny_config({"method": "ddp", **options}, inner__batch_size_by_site=sizes))
    assert isinstance(run.sync, GradientSync)
    batches = [run.sites[site].stream.next_batch(size) for site, size in enumerate(sizes)]
    one = make_run(
        tiny_config(
            {"num_sites": 1, "placement.replication_factor": 1, **options},
            inner__batch_size=sum(sizes),
        )
    ).sites[0]
    for name, parameter in run.sites[0].parameters.items():
        one.parameters[name].detach().copy_(parameter.detach())
    for site, batch in enumerate(batches):
        run.sites[site].stream = Given(batch)
        run.sites[site].backward()
    one.stream = Given(np.concatenate(batches))
    one.backward()
    run.sync.average_gradients()
    for name, parameter in one.trainable.items():
        for site in run.sites.values():
            found = site.trainable[name].grad
            torch.testing.assert_close(found, parameter.grad, rtol=1e-4, atol=1e-6, msg=name)


# --------------------------------------------------------------------------------------- refused

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "length": ({BY_SITE: [2, 2, 2]}, "[2, 2, 2] must have a number for each of 4 sites"),
    "zero": ({BY_SITE: [2, 0, 2, 2]}, "[2, 0, 2, 2] must be at least 1 at every site"),
    "weight": (
        {BY_SITE: [2, 1, 2, 2]},
        "sync.weight presence must be tokens or uniform where inner.batch_size_by_site has",
    ),
    "size": ({BY_SITE: [10**9, 1, 1, 1], "sync.weight": "tokens"}, "tokens at once"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_a_wrong_table_is_refused(case: str) -> None:
    options, message = REFUSED[case]
    with pytest.raises(ConfigError) as caught:
        tiny_config(options)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_ranks_of_each_site_share_its_batch() -> None:
    options = {"inner.parallel": "ddp", "sync.weight": "tokens"}
    check_ranks(tiny_config(options, inner__batch_size_by_site=(2, 4, 6, 2)), 2)
    rule = r"inner.batch_size_by_site \[2, 4, 5, 2\] must have multiples of 2: the 2 ranks"
    with pytest.raises(ConfigError, match=rule):
        check_ranks(tiny_config(options, inner__batch_size_by_site=(2, 4, 5, 2)), 2)


# ------------------------------------------------------------------------------------------ runs


def assert_equal_parts(left: Path, right: Path, *, sites: int = 3) -> None:
    for site in range(sites):
        one, other = load_part(left, 2, site)[0], load_part(right, 2, site)[0]
        assert one.keys() == other.keys()
        differ = {name for name, tensor in one.items() if not torch.equal(tensor, other[name])}
        assert differ <= {"rng"}  # of the process, which nothing draws from


def test_equal_numbers_are_the_plain_option(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    plain = trained(config, f"run.dir={tmp_path}/plain")
    table = trained(config, f"run.dir={tmp_path}/table", f"{BY_SITE}=[2,2,2]", "inner.batch_size=7")
    assert table["val_loss_merged"] == plain["val_loss_merged"]
    assert_equal_parts(tmp_path / "plain", tmp_path / "table")


def test_a_run_of_unequal_batches_goes_on(tmp_path: Path) -> None:
    """It counts its own tokens, resumes to the bit, and refuses another table."""
    config = write_config(tmp_path)
    whole, parts = f"run.dir={tmp_path}/whole", f"run.dir={tmp_path}/parts"
    summary = trained(config, whole, *UNEQUAL)
    assert summary["tokens_by_site"] == [2 * 2 * 16 * size for size in (4, 2, 6)]
    assert summary["tokens"] == 2 * 2 * 16 * 12
    rows = records(tmp_path / "whole", "round")
    assert {(r["site"], r["tokens"]) for r in rows} == {(0, 128), (1, 64), (2, 192)}
    trained(config, parts, *UNEQUAL, "rounds=1")
    other = (f"{BY_SITE}=[4,2,5]", "sync.weight=tokens")
    refused = fomoe("train", config, parts, *other, "--resume")
    assert refused.status == 1
    assert f"{BY_SITE} (was [4, 2, 6], now [4, 2, 5])" in refused.err
    trained(config, parts, *UNEQUAL, "--resume")
    assert_equal_parts(tmp_path / "whole", tmp_path / "parts")
    dry = fomoe("train", config, *UNEQUAL, "--dry-run")
    assert "tokens per step" in dry.out


def test_one_process_and_many_train_the_same(tmp_path: Path) -> None:
    """Proxy and distributed to the bit, with the method ddp, too; two ranks within rounding."""
    tree = tiny_tree(tmp_path)
    path = tmp_path / "batches.yaml"
    path.write_text(yaml.safe_dump(tree))
    runs: dict[str, tuple[str, ...]] = {"fomoe": UNEQUAL, "ddp": ("method=ddp", UNEQUAL[0])}
    commands, summaries = [], []
    for name, words in runs.items():
        summaries.append(trained(path, *words, f"run.dir={tmp_path}/{name}"))
        own = ("train", path, "--json", *words, f"run.dir={tmp_path}/{name}-apart")
        commands.append(Command(tmp_path / f"{name}.log", 3, own))
    ranks = ("inner.parallel=fsdp", "--ranks-per-site", 2, f"run.dir={tmp_path}/ranks")
    own = ("train", path, "--json", *UNEQUAL, *ranks)
    commands.append(Command(tmp_path / "ranks.log", 6, own))
    found = [world.summary for world in worlds(*commands)]
    for proxy, distributed in zip(summaries, found[:2], strict=True):
        for key in ("tokens_by_site", "val_loss_merged", "skipped_fraction_by_site"):
            assert distributed[key] == proxy[key]
    assert found[2]["tokens_by_site"] == summaries[0]["tokens_by_site"]
    for name in runs:
        assert_equal_parts(tmp_path / name, tmp_path / f"{name}-apart")
        one, many = (
            {(r["step"], r["site"]): (r["loss"], r["tokens"]) for r in records(folder, "step")}
            for folder in (tmp_path / name, tmp_path / f"{name}-apart")
        )
        assert many.items() <= one.items()  # the file of the first site
    for site in range(3):
        one, two = Part(tmp_path / "fomoe", 2, site), Part(tmp_path / "ranks", 2, site)
        for name in one.kept:
            left, right = one.read(name), two.read(name)
            if name != "rng":
                torch.testing.assert_close(left, right, rtol=1e-4, atol=1e-5, msg=name)


def test_one_site_alone_needs_no_table(tmp_path: Path) -> None:
    """`fomoe compare` runs the method single on the same file."""
    tree = tiny_tree(tmp_path)
    tree["inner"]["batch_size_by_site"] = [4, 2, 6]
    tree["sync"] = {"weight": "tokens"}
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tree))
    assert load_config(path, ("method=single",)).batch_sizes == (2,)
