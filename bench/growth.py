"""How the cost of the expert layer grows: with executed assignments, residents and all experts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from bench.layers import PLAIN_SKIP, Row, router_step
from bench.machine import LayerShape, Machine
from bench.timing import side_by_side
from fomoe.load import build_config
from fomoe.model.router import Routing
from fomoe.model.transformer import MoE

SHARES = (0.25, 0.5, 0.75, 1.0)
RESIDENTS = (8, 16, 32, 64)
ALL_EXPERTS = (16, 32, 64, 128)


def growth_rows(machine: Machine) -> list[Row]:
    """Three series of experts forward and backward without the router, all timed side by side.

    - assignments: 8 of 16 experts resident; the share of the assignments that executes varies.
    - residents: every assignment executes, on 8 to 64 resident experts.
    - experts: 8 residents execute half of the assignments; the number of absent experts varies.
    The router's own time for each number of experts is a fourth series.
    """
    shape = machine.layers[0]
    work: dict[tuple[str, float], Callable[[], object]] = {}
    state: dict[tuple[str, float], float] = {}
    for series, value, num_experts, num_resident, share in points():
        layer, step = experts_step(machine, shape, num_experts, num_resident, share)
        work[series, value] = step
        state[series, value] = sum(p.numel() for p in layer.experts.parameters()) * 16 / 1e6
        if series == "experts":
            work["router", value] = router_step(layer, shape, machine)
            state["router", value] = 0.0
    names = {f"{series} {value:g}": (series, value) for series, value in work}
    times = side_by_side(
        {name: work[key] for name, key in names.items()},
        budget_s=machine.budget_s,
        clock=machine.clock,
    )
    return [
        {"series": series, "value": value, "ms": times[name].median * 1e3,
         "spread": times[name].spread, "state_mb": state[series, value]}
        for name, (series, value) in names.items()
    ]  # fmt: skip


def points() -> list[tuple[str, float, int, int, float]]:
    """Series, position, all experts, residents, executed share."""
    return [
        *(("assignments", share, 16, 8, share) for share in SHARES),
        *(("residents", float(r), r, r, 1.0) for r in RESIDENTS),
        *(("experts", float(e), e, 8, 0.5) for e in ALL_EXPERTS),
    ]


def experts_step(
    machine: Machine, shape: LayerShape, num_experts: int, num_resident: int, share: float
) -> tuple[MoE, Callable[[], object]]:
    """A layer's experts on a routing of which a given share executes, evenly over residents."""
    model: dict[str, Any] = {
        "num_layers": 1, "d_model": shape.width, "num_experts": num_experts,
        "top_k": shape.top_k, "expert_ffn_dim": shape.hidden,
    }  # fmt: skip
    config = build_config({"num_sites": 1, "model": model, **PLAIN_SKIP})
    layer = MoE(config, tuple(range(num_resident))).to(machine.device)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    routing = even_routing(shape, num_experts, num_resident, share, machine.device)
    x_TD = torch.randn(shape.tokens, shape.width, device=machine.device, requires_grad=True)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        with torch.autocast(machine.device.type, torch.bfloat16, machine.dtype == torch.bfloat16):
            y_TD = layer.experts(x_TD, routing)
        y_TD.backward(torch.ones_like(y_TD))

    return layer, step


def even_routing(
    shape: LayerShape, num_experts: int, num_resident: int, share: float, device: torch.device
) -> Routing:
    """The first `share` of the tokens choose residents in turn, the others absent experts."""
    tokens = torch.arange(shape.tokens, device=device)
    slots_TK = torch.stack([tokens + k for k in range(shape.top_k)], dim=-1)
    absent_TK = num_resident + slots_TK % max(num_experts - num_resident, 1)
    executed_T = tokens < round(share * shape.tokens)
    executed_TK = executed_T[:, None].expand_as(slots_TK)
    expert_TK = torch.where(executed_TK, slots_TK % num_resident, absent_TK)
    return Routing(
        expert_TK=expert_TK,
        gate_TK=torch.where(executed_TK, 1.0 / shape.top_k, 0.0),
        executed_TK=executed_TK,
        selected_TK=expert_TK,
    )
