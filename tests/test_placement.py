"""Who holds what: every expert has a holder, loads are even, and no site is favoured."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterator
from typing import Annotated, Literal

import pytest
from conftest import LAYOUTS, tiny_config
from pydantic import Field

from fomoe.config import Config
from fomoe.errors import ConfigError
from fomoe.kinds import (
    CyclicPlacement,
    PlacementKind,
    by_capacity,
    capacity_slots,
    common,
    cyclic,
)
from fomoe.options import Text, default_kind, option_names, parse_options, refuse_other_kinds
from fomoe.overrides import parse_override
from fomoe.placement import build_placement


def shapes(count: int = 300) -> Iterator[tuple[random.Random, int, int, int]]:
    """Random numbers of layers, experts and sites, uneven ones included."""
    for seed in range(count):
        rng = random.Random(seed)
        yield rng, rng.randint(1, 6), rng.randint(1, 17), rng.randint(1, 7)


def loads(row, num_sites: int) -> list[int]:
    counts = Counter(site for sites in row for site in sites)
    return [counts[site] for site in range(num_sites)]


def test_cyclic_puts_every_expert_on_r_consecutive_sites():
    for rng, num_layers, num_experts, num_sites in shapes():
        r = rng.randint(1, num_sites)
        table = cyclic(num_layers, num_experts, num_sites, r)
        assert [len(row) for row in table] == [num_experts] * num_layers
        for row in table:
            for sites in row:
                assert len(set(sites)) == r
                assert sites == tuple(sorted(sites))
                runs = [tuple(sorted((s + i) % num_sites for i in range(r))) for s in sites]
                assert sites in runs, "holders are not consecutive"


def test_cyclic_is_balanced_in_every_layer():
    for rng, num_layers, num_experts, num_sites in shapes():
        r = rng.randint(1, num_sites)
        rest = num_experts % num_sites
        for row in cyclic(num_layers, num_experts, num_sites, r):
            spread = max(loads(row, num_sites)) - min(loads(row, num_sites))
            assert spread <= min(r, num_sites - r, rest, num_sites - rest)


def test_cyclic_offset_favours_no_site_over_layers():
    """Uneven shapes give some site more experts in one layer; over K layers it evens out."""
    for rng, _, num_experts, num_sites in shapes():
        r = rng.randint(1, num_sites)
        table = cyclic(num_sites, num_experts, num_sites, r)
        total = [sum(column) for column in zip(*(loads(x, num_sites) for x in table), strict=True)]
        assert set(total) == {num_experts * r}


def test_cyclic_with_one_holder_partitions_the_experts():
    for _, num_layers, num_experts, num_sites in shapes(100):
        for row in cyclic(num_layers, num_experts, num_sites, 1):
            assert sum(loads(row, num_sites)) == num_experts


def test_common_experts_are_everywhere_and_the_others_at_one_site():
    for rng, num_layers, num_experts, num_sites in shapes():
        num_common = rng.randint(0, num_experts)
        for row in common(num_layers, num_experts, num_sites, num_common):
            assert all(sites == tuple(range(num_sites)) for sites in row[:num_common])
            assert all(len(sites) == 1 for sites in row[num_common:])
            single = loads(row[num_common:], num_sites)
            assert max(single) - min(single) <= 1


def test_capacity_is_used_fully_and_every_expert_has_a_holder():
    for rng, num_layers, num_experts, num_sites in shapes():
        slots = tuple(rng.randint(0, num_experts) for _ in range(num_sites))
        if sum(slots) < num_experts:
            continue
        for row in by_capacity(num_layers, num_experts, slots):
            assert loads(row, num_sites) == list(slots)
            counts = [len(sites) for sites in row]
            assert min(counts) >= 1
            assert max(counts) - min(counts) <= 1
            assert all(len(set(sites)) == len(sites) for sites in row)


def test_capacity_with_r_gives_exactly_r_holders_and_fills_evenly():
    for rng, num_layers, num_experts, num_sites in shapes():
        r = rng.randint(1, num_sites)
        capacity = tuple(rng.randint(0, num_experts + 3) for _ in range(num_sites))
        if sum(min(c, num_experts) for c in capacity) < r * num_experts:
            continue
        slots = capacity_slots(capacity, num_experts, r)
        assert sum(slots) == r * num_experts
        assert all(used <= limit for used, limit in zip(slots, capacity, strict=True))
        # A site holds less than another only because it cannot hold more.
        for used, limit in zip(slots, capacity, strict=True):
            assert used >= max(slots) - 1 or used == min(limit, num_experts)
        for row in by_capacity(num_layers, num_experts, slots):
            assert {len(sites) for sites in row} == {r}


def test_capacity_without_r_fills_every_slot():
    assert capacity_slots((20, 3, 0), 8, None) == (8, 3, 0)


def test_table_is_taken_as_given_for_all_layers_or_per_layer():
    sites = [[0], [2, 0], [1, 2], [0, 1, 2]]
    same = {
        "num_sites": 3,
        "model.num_experts": 4,
        "placement.kind": "table",
        "placement.replication_factor": None,
    }
    read = ((0,), (0, 2), (1, 2), (0, 1, 2))
    config = tiny_config(same | {"placement.table": sites})
    assert build_placement(config).holders == (read, read)
    config = tiny_config(same | {"placement.table": [sites, sites[::-1]]})
    assert build_placement(config).holders == (read, read[::-1])


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_is_complete_and_says_the_same_from_both_sides(layout):
    config = tiny_config(LAYOUTS[layout])
    placement = build_placement(config)
    assert placement.moe_layers == config.model.moe_layers
    assert len(placement.holders) == len(placement.trainers) == len(placement.moe_layers)
    for row, layer in enumerate(placement.moe_layers):
        assert len(placement.holders[row]) == config.model.num_experts
        for expert, holders in enumerate(placement.holders[row]):
            assert holders
            assert placement.trainers[row][expert]
            assert set(placement.trainers[row][expert]) <= set(holders)
            for site in range(config.num_sites):
                assert (expert in placement.residents(site)[layer]) == (site in holders)
                trained = expert in placement.trained(site)[layer]
                assert trained == (site in placement.trainers[row][expert])


def test_store_all_holds_everywhere_and_trains_by_the_table():
    config = tiny_config(placement__store="all", placement__replication_factor=1)
    placement = build_placement(config)
    assert all(len(sites) == 4 for row in placement.holders for sites in row)
    assert placement.trainers == cyclic(2, 8, 4, 1)
    assert not placement.full
    assert build_placement(tiny_config(method="diloco")).full


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"placement.replication_factor": 5}, "replication_factor 5 exceeds the 4 sites"),
        ({"placement.replication_factor": None}, "replication_factor null must be set"),
        ({"placement.capacity": [1, 1, 1, 1]}, "without a holder"),
        ({"placement.capacity": [4, 4, 4]}, "each of the 4 sites"),
        ({"placement.capacity": [8, 8, 8, -1]}, "must not be negative"),
        ({"placement.capacity": [8, 4, 2, 1]}, "has 15 slots"),
        ({"placement.kind": "common"}, "has no meaning for common"),
        (
            {"placement.kind": "common", "placement.replication_factor": None},
            "num_common null must be set",
        ),
        (
            {"placement.num_common": 2},
            "num_common 2 is an option of common placement and has no meaning for cyclic placement",
        ),
        ({"placement.table": [[0]] * 8}, "is an option of table placement"),
        (
            {
                "placement.kind": "common",
                "placement.num_common": 2,
                "placement.replication_factor": None,
                "placement.capacity": [8, 5, 2, 1],
            },
            "is an option of cyclic placement and has no meaning for common placement",
        ),
        (
            {
                "placement.kind": "common",
                "placement.num_common": 9,
                "placement.replication_factor": None,
            },
            "num_common 9 exceeds the 8 experts",
        ),
    ],
)
def test_options_that_leave_an_expert_alone_or_contradict_are_refused(options, words):
    with pytest.raises(ConfigError, match=words):
        tiny_config(options)


@pytest.mark.parametrize(
    ("table", "words"),
    [
        ([[0], [], [1], [1]], "expert 1: \\[\\] leaves the expert without a holder"),
        ([[0], [4], [1], [1]], "4 is not a site from 0 to 3"),
        ([[0], [True], [1], [1]], "True is not a site"),
        ([[0], [1, 1], [1], [1]], "names site 1 twice"),
        ([[0], [1], [2]], "must list 4 experts"),
        ([[[0], [1], [2], [3]]] * 3, "must have 2 MoE layers"),
    ],
)
def test_wrong_tables_are_refused(table, words):
    options = {
        "model.num_experts": 4,
        "placement.kind": "table",
        "placement.replication_factor": None,
        "placement.table": table,
    }
    with pytest.raises(ConfigError, match=words):
        tiny_config(options)


# ----------------------------------------------------------------------------------------- kinds


@pytest.mark.parametrize("layout", ["cyclic", "common", "capacity", "table", "diloco", "spes"])
def test_null_for_an_option_of_another_kind_is_no_value(layout):
    names = ("replication_factor", "capacity", "num_common", "table")
    plain = tiny_config(LAYOUTS[layout])
    own = plain.placement.model_dump()
    unset = {f"placement.{name}": None for name in names if own.get(name) is None}
    assert tiny_config(LAYOUTS[layout] | unset) == plain
    assert set(own) - {"kind", "store"} <= set(names)


def test_a_section_without_its_kind_is_cyclic():
    placement = tiny_config().placement
    assert placement == CyclicPlacement(replication_factor=2)
    assert Config.model_validate({"placement": {}}).placement == CyclicPlacement()


def test_every_option_of_every_kind_is_known_by_name_once():
    names = [name for name in option_names(Config) if name.startswith("placement.")]
    options = ("kind", "store", "replication_factor", "capacity", "num_common", "table")
    options += ("grow_at", "couple")
    assert sorted(names) == sorted(f"placement.{option}" for option in options)


class OneSite(PlacementKind):
    """Every expert on the site of a name: a kind that only this test knows."""

    kind: Literal["one-site"] = "one-site"
    name: Text = "a"

    def assign(self, num_layers, num_experts, num_sites):
        if not 0 <= (site := ord(self.name) - ord("a")) < num_sites:
            raise ConfigError("placement.name", self.name, f"is not one of {num_sites} sites")
        return (((site,),) * num_experts,) * num_layers


class WithOneSite(Config):
    placement: Annotated[
        CyclicPlacement | OneSite, Field(discriminator="kind"), default_kind("cyclic")
    ] = CyclicPlacement()


def test_a_new_kind_is_one_class_with_its_function():
    """Parsing, names, overrides, refusals and the table follow from the class alone."""
    assert "placement.name" in option_names(WithOneSite)
    assert parse_override("placement.name=1", WithOneSite) == ("placement.name", "1")

    def read(**placement) -> Config:
        config = parse_options({"num_sites": 3, "placement": placement}, WithOneSite)
        refuse_other_kinds(config)
        return config

    config = read(kind="one-site", name="c", replication_factor=None)
    assert build_placement(config).holders == (((2,),) * 8,) * 4
    assert build_placement(read(kind="one-site", store="all")).trainers == (((0,),) * 8,) * 4
    assert WithOneSite.model_validate(config.model_dump(mode="json")) == config
    for wrong, words in (
        ({"kind": "one-site", "name": "d"}, "placement.name d is not one of 3 sites"),
        ({"kind": "one-site", "name": ""}, "placement.name '' must not be empty"),
        ({"kind": "one-site", "replication_factor": 2}, "2 is an option of cyclic placement"),
        ({"name": "c", "replication_factor": 2}, "name c is an option of one-site placement"),
        ({"kind": "one-sit"}, "placement.kind 'one-sit' must be one of cyclic or one-site"),
        ({"kind": "one-site", "nam": "c"}, r"did you mean placement.name\?"),
    ):
        with pytest.raises(ConfigError, match=words):
            build_placement(read(**wrong))
