"""Parked sites train, sync and save exactly as those that stay; the copies are real."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from conftest import assert_same_bits, make_run, make_site, one_round, tiny_config

from fomoe.errors import ConfigError
from fomoe.parking import Parking, parks, unparked
from fomoe.run import Run


def park_all(run: Run) -> None:
    for index, site in run.sites.items():
        run.parkings[index] = Parking(site, pin=False)
        run.parkings[index].park()


@pytest.mark.parametrize("backend", ["split", "grouped_mm"])
def test_parked_rounds_are_bit_identical(backend: str) -> None:
    config = tiny_config(model__experts__backend=backend, model__matmul="torch")
    staying, parked = make_run(config), make_run(config)
    park_all(parked)
    for round_idx in range(3):
        for run in (staying, parked):
            one_round(run, round_idx)
    for index, site in staying.sites.items():
        assert_same_bits(site.state()[0], parked.sites[index].state()[0])


def test_training_leaves_the_host_copy_alone_until_the_site_parks() -> None:
    site = make_site(tiny_config())
    parking = Parking(site, pin=False)
    site.run_local_steps(1, lambda _: None)
    parking.park()
    assert all(p.grad is None for p in site.parameters.values())
    parameter = next(iter(site.trainable.values()))
    host = parameter.data
    moments = site.optimizer.state[parameter]["exp_avg"]
    before, moments_before = host.clone(), moments.clone()
    with unparked([parking], optimizer=True):
        site.run_local_steps(1, lambda _: None)
        assert torch.equal(host, before)
        assert torch.equal(moments, moments_before)
        trained = parameter.detach().clone()
    assert parameter.data_ptr() == host.data_ptr()
    assert torch.equal(host, trained)
    assert not torch.equal(host, before)
    assert site.optimizer.state[parameter]["exp_avg"] is moments
    assert not torch.equal(moments, moments_before)


def test_evaluation_leaves_the_optimizer_parked() -> None:
    site = make_site(tiny_config())
    site.run_local_steps(1, lambda _: None)
    parking = Parking(site, pin=False)
    parking.park()
    parameter = next(iter(site.trainable.values()))
    moments = site.optimizer.state[parameter]["exp_avg"]
    with unparked([parking], optimizer=False):
        assert site.optimizer.state[parameter]["exp_avg"] is moments


def test_auto_parks_where_the_sites_do_not_fit(monkeypatch: pytest.MonkeyPatch) -> None:
    memory = SimpleNamespace(parameters=100, gradients=100, inner_optimizer=200)
    cuda, cpu = torch.device("cuda"), torch.device("cpu")
    for free, expected in ((3200, False), (3199, True)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free: (free, free))
        assert parks(tiny_config(), [memory] * 4, cuda) is expected
        assert not parks(tiny_config(), [memory], cuda)
        assert not parks(tiny_config(), [memory] * 4, cpu)
        assert not parks(tiny_config(run__park="never"), [memory] * 4, cuda)
        assert parks(tiny_config(run__park="always"), [memory], cuda)


def test_parking_that_cannot_help_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"run\.park always needs an accelerator"):
        parks(tiny_config(run__park="always"), [], torch.device("cpu"))
    with pytest.raises(ConfigError, match="no waiting sites"):
        parks(tiny_config(run__park="always", method="ddp"), [], torch.device("cuda"))
