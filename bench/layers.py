"""Rows (a) to (c): the matrix peak, one MoE layer on each backend, the same layer elsewhere."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from bench.machine import LayerShape, Machine
from bench.timing import Timing, side_by_side
from fomoe.errors import ConfigError
from fomoe.load import build_config
from fomoe.model.backends.choice import choose_backend
from fomoe.model.matmul import ONEDNN, TORCH, has_onednn
from fomoe.model.transformer import MoE

Row = dict[str, Any]
SHARES = {"1": 1, "1/2": 2, "1/4": 4}


def peak_rate(machine: Machine) -> Row:
    """(a) Best rate of a large square product, in GFLOP/s."""
    size = 1536 if machine.device.type == "cpu" else 8192
    left, right = (
        torch.randn(size, size, device=machine.device, dtype=machine.dtype) for _ in range(2)
    )
    candidates: dict[str, Callable[[], object]] = {"torch": lambda: left @ right}
    if machine.device.type == "cpu" and has_onednn():
        candidates["onednn"] = lambda: ONEDNN.forward(left, right)
    times = side_by_side(candidates, budget_s=machine.budget_s / 2, clock=machine.clock)
    return {name: 2 * size**3 / t.median / 1e9 for name, t in times.items()}


def layer_rows(machine: Machine, shape: LayerShape) -> list[Row]:
    """(b) and (c) for one shape, all timed side by side."""
    x_TD = torch.randn(shape.tokens, shape.width, device=machine.device)
    x_TD.requires_grad_()
    layers: dict[tuple[str, str], MoE] = {}
    candidates: dict[str, Callable[[], object]] = {}
    for backend in ("split", "grouped_mm", "megablocks"):
        for share, parts in SHARES.items():
            layer = build_layer(machine, shape, backend, shape.num_experts // parts)
            if layer is None or (share != "1" and not _portrayed(machine, backend)):
                continue
            layers[backend, share] = layer
            candidates[f"{backend} {share}"] = lambda m=layer: run(m, x_TD, machine)
            candidates[f"{backend} {share} forward"] = lambda m=layer: forward(m, x_TD, machine)
    router = build_layer(machine, shape, "auto", shape.num_experts)
    if router is not None:
        candidates["router"] = router_step(router, shape, machine)
    for name, block in library_blocks(machine, shape).items():
        candidates[name] = lambda m=block: run(m, x_TD.unsqueeze(0), machine)
    for name, products in product_candidates(machine, shape).items():
        candidates[name] = products
    times = side_by_side(candidates, budget_s=machine.budget_s, clock=machine.clock)
    gemm = min((t for n, t in times.items() if n.startswith("products")), key=lambda t: t.median)
    rows = []
    for name, timing in times.items():
        backend, _, rest = name.partition(" ")
        layer = layers.get((backend, rest.removesuffix(" forward")))
        executed = executed_share(layer, x_TD, machine) if layer is not None else 1.0
        rows.append(_row(shape, name, timing, executed, gemm, times, backend))
    return rows


def _portrayed(machine: Machine, backend: str) -> bool:
    """On CPU only the default is worth the time of half and quarter residency."""
    return machine.device.type == "cuda" or backend == "split"


def _row(
    shape: LayerShape,
    name: str,
    timing: Timing,
    executed: float,
    gemm: Timing,
    times: dict[str, Timing],
    backend: str,
) -> Row:
    flops = shape.flops * executed / (3 if name.endswith("forward") else 1)
    if name == "router":
        flops = 6 * shape.tokens * shape.width * shape.num_experts
    full = times.get(f"{backend} 1" + (" forward" if name.endswith("forward") else ""))
    return {
        "shape": shape.name,
        "what": name,
        "ms": timing.median * 1e3,
        "spread": timing.spread,
        "executed": executed,
        "gflops": flops / timing.median / 1e9,
        "share_of_products": gemm.over(timing) * flops / shape.flops,
        "over_full": _over_full(name, timing, times, full),
    }


def _over_full(
    name: str, timing: Timing, times: dict[str, Timing], full: Timing | None
) -> float | None:
    """Time over that of the same backend with all experts; the router's over the best of those."""
    if name == "router":
        whole = [t for n, t in times.items() if n.endswith(" 1")]
        full = min(whole, key=lambda t: t.median)
    return None if full is None else timing.over(full)


def build_layer(machine: Machine, shape: LayerShape, backend: str, num_resident: int) -> MoE | None:
    """A layer that holds its first experts, or None where the backend cannot run."""
    model = {
        "num_layers": 1,
        "d_model": shape.width,
        "num_experts": shape.num_experts,
        "top_k": shape.top_k,
        "expert_ffn_dim": shape.hidden,
        "experts": {"backend": backend},
    }
    config = build_config({"num_sites": 1, "model": model, **PLAIN_SKIP})
    try:
        choose_backend(config.model, machine.device, machine.dtype)
    except ConfigError:
        return None
    layer = MoE(config, tuple(range(num_resident)))
    torch.manual_seed(0)
    for parameter in layer.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    # Rows of equal length choose every expert equally often.
    layer.router.weight.data /= layer.router.weight.data.norm(dim=-1, keepdim=True)
    return layer.to(machine.device)


PLAIN_SKIP: dict[str, Any] = {
    "placement": {"replication_factor": 1},
    "router": {"at_least_one": False},
}


def library_blocks(machine: Machine, shape: LayerShape) -> dict[str, torch.nn.Module]:
    """transformers' block of the same shape, in each setting that fits into memory."""
    try:
        import transformers
    except ImportError:
        return {}
    blocks = {}
    for setting in ("eager", "grouped_mm"):
        config = transformers.OlmoeConfig(
            vocab_size=64,
            hidden_size=shape.width,
            intermediate_size=shape.hidden,
            num_hidden_layers=1,
            num_attention_heads=4,
            num_experts=shape.num_experts,
            num_experts_per_tok=shape.top_k,
            norm_topk_prob=True,
        )
        model = transformers.OlmoeForCausalLM(config)
        model.set_experts_implementation(setting)
        blocks[f"transformers {setting}"] = model.model.layers[0].mlp.to(machine.device)
    return blocks


def product_candidates(machine: Machine, shape: LayerShape) -> dict[str, Callable[[], object]]:
    """The layer's six products per expert alone, on ready operands of the same sizes."""
    rows = shape.tokens * shape.top_k // shape.num_experts

    def operand(*sizes: int) -> Tensor:
        return torch.randn(sizes, device=machine.device, dtype=machine.dtype)

    x, h, a = (
        operand(rows, shape.width),
        operand(rows, 2 * shape.hidden),
        operand(rows, shape.hidden),
    )
    weights = [
        (operand(2 * shape.hidden, shape.width), operand(shape.width, shape.hidden))
        for _ in range(shape.num_experts)
    ]
    kinds = {"torch": TORCH}
    if machine.device.type == "cpu" and has_onednn():
        kinds["onednn"] = ONEDNN

    def work(products: Any) -> None:
        for gate_up, down in weights:
            products.forward(x, gate_up)
            products.forward(a, down)
            products.input_grad(x, down)
            products.input_grad(h, gate_up)
            products.weight_grad(h, x)
            products.weight_grad(x, a)

    return {f"products {name}": lambda p=kind: work(p) for name, kind in kinds.items()}


def router_step(layer: MoE, shape: LayerShape, machine: Machine) -> Callable[[], object]:
    """The router alone, forward and backward through its gates and losses."""
    x_TD: Tensor = torch.randn(shape.tokens, shape.width, device=machine.device, requires_grad=True)

    def step() -> None:
        layer.zero_grad(set_to_none=True)
        x_TD.grad = None
        routing, stats = layer.router(x_TD, layer.experts.resident_E, len(layer.experts))
        (routing.gate_TK.sum() + stats.lb_loss + stats.z_loss).backward()

    return step


def run(layer: torch.nn.Module, x: Tensor, machine: Machine) -> None:
    """Forward and backward, gradients of input and parameters."""
    layer.zero_grad(set_to_none=True)
    x.grad = None
    with torch.autocast(machine.device.type, torch.bfloat16, machine.dtype == torch.bfloat16):
        result = layer(x)
    output = result[0] if isinstance(result, tuple) else result
    output.backward(torch.ones_like(output))


@torch.no_grad()
def forward(layer: torch.nn.Module, x: Tensor, machine: Machine) -> Any:
    with torch.autocast(machine.device.type, torch.bfloat16, machine.dtype == torch.bfloat16):
        return layer(x)


def executed_share(layer: MoE, x: Tensor, machine: Machine) -> float:
    """Share of the assignments that ran."""
    return float(forward(layer, x, machine)[1].executed_TK.float().mean())
