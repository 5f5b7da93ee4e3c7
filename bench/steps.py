"""Rows (d) to (f): whole training steps, ours and transformers', and their memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from bench.layers import Row
from bench.machine import Machine, StepShape
from bench.timing import side_by_side
from fomoe.config import Config
from fomoe.load import build_config
from fomoe.planning import plan_run
from fomoe.site import Site
from fomoe_sim.shape import shape_from_config, token_work

RESIDENTS = {"1": 1.0, "1/2": 0.5, "1/4": 0.25, "0": 0.0}


class RandomTokens:
    """An endless stream of random sequences."""

    def __init__(self, shape: StepShape) -> None:
        self._shape, self._random = shape, np.random.default_rng(0)

    def next_batch(self, batch_size: int) -> np.ndarray:
        return self._random.integers(0, self._shape.vocab, (batch_size, self._shape.seq_len + 1))

    def state(self) -> dict[str, int]:
        return {}

    def load_state(self, state: dict[str, int]) -> None:
        pass


def step_config(shape: StepShape, share: float = 1.0, **model: Any) -> Config:
    """The experiment of a step whose first site holds a share of the experts of every layer."""
    held = round(shape.num_experts * share)
    table = [[0] if expert < held else [1] for expert in range(shape.num_experts)]
    return build_config(
        {
            "num_sites": 2,
            "placement": {"kind": "table", "table": table},
            "router": {"at_least_one": model.pop("at_least_one", False)},
            "inner": {"batch_size": shape.batch},
            "data": {"source": "random.npy", "tokenizer": "none", "seq_len": shape.seq_len},
            "model": {
                "vocab_size": shape.vocab,
                "num_layers": shape.layers,
                "d_model": shape.width,
                "num_heads": shape.heads,
                "num_experts": shape.num_experts,
                "top_k": shape.top_k,
                "expert_ffn_dim": shape.hidden,
                "qk_norm": "full",
                **model,
            },
        }
    )


def build_site(machine: Machine, share: float, **model: Any) -> Site:
    """A site that holds a share of the experts of every layer."""
    plan = plan_run(step_config(machine.step, share, **model))
    return Site(plan, 0, stream=RandomTokens(machine.step), device=machine.device)


def transformers_step(machine: Machine, setting: str) -> Callable[[], object] | None:
    """The same step of transformers' OLMoE: SDPA, fused AdamW, no router losses."""
    try:
        import transformers
    except ImportError:
        return None
    shape = machine.step
    config = transformers.OlmoeConfig(
        vocab_size=shape.vocab,
        hidden_size=shape.width,
        intermediate_size=shape.hidden,
        num_hidden_layers=shape.layers,
        num_attention_heads=shape.heads,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        max_position_embeddings=shape.seq_len,
        use_cache=False,
        pad_token_id=None,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="sdpa",
    )
    model = transformers.OlmoeForCausalLM(config).to(machine.device).train()
    model.set_experts_implementation(setting)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3, fused=True)
    stream = RandomTokens(shape)

    def step() -> None:
        tokens = torch.from_numpy(stream.next_batch(shape.batch)[:, :-1]).to(machine.device)
        optimizer.zero_grad(set_to_none=True)
        with torch.autocast(machine.device.type, torch.bfloat16, machine.dtype == torch.bfloat16):
            loss = model(input_ids=tokens, labels=tokens).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()

    return step


def step_rows(machine: Machine, peak_gflops: float) -> list[Row]:
    """(d) and (e): ours with all, half, a quarter and none of the experts, beside transformers'."""
    sites = {f"ours R/E {name}": build_site(machine, share) for name, share in RESIDENTS.items()}
    sites["ours R/E 1/2, at_least_one"] = build_site(machine, 0.5, at_least_one=True)
    candidates: dict[str, Callable[[], object]] = {
        name: lambda s=site: s.run_local_steps(1, lambda _: None) for name, site in sites.items()
    }
    for setting in ("eager", "grouped_mm"):
        step = transformers_step(machine, setting)
        if step is not None:
            candidates[f"transformers {setting}"] = step
    times = side_by_side(candidates, budget_s=4 * machine.budget_s, clock=machine.clock)
    theirs = [t for name, t in times.items() if name.startswith("transformers")]
    best = min(theirs, key=lambda t: t.median) if theirs else None
    full, none = times["ours R/E 1"], times["ours R/E 0"]
    expert_share = 1 - none.over(full)
    tokens = machine.step.batch * machine.step.seq_len
    rows = []
    for name, timing in times.items():
        executed = executed_fraction(sites[name]) if name in sites else 1.0
        bound = 1 / (1 - expert_share * (1 - executed))
        gflop = step_flops(machine.step, executed) / 1e9
        rows.append(
            {
                "what": name,
                "ms": timing.median * 1e3,
                "spread": timing.spread,
                "tokens_per_s": tokens / timing.median,
                "over_transformers": None if best is None else best.over(timing),
                "flop_utilisation": gflop / timing.median / peak_gflops,
                "executed": executed,
                "expert_share": expert_share,
                "gain": full.over(timing) if name in sites else None,
                "share_of_bound": full.over(timing) / bound if name in sites else None,
            }
        )
    return rows


def step_flops(shape: StepShape, executed: float) -> float:
    """Matrix products and causal attention of one step, as the cost model counts them."""
    config = step_config(shape)
    work = token_work(shape_from_config(config, "step"), shape.seq_len)
    per_token = work.products + work.scores + work.experts * executed
    return shape.batch * shape.seq_len * per_token


def executed_fraction(site: Site) -> float:
    """Of the assignments since the last call."""
    routing = site.end_round()
    return float(routing.executed_LE.sum() / routing.selected_LE.sum())


def memory_rows(machine: Machine) -> list[Row]:
    """(f) Bytes of parameters, gradients and moments, and of what one step keeps or peaks at."""
    rows = []
    for recompute in ("none", "experts", "layers"):
        for name in ("1", "1/2", "1/4"):
            site = build_site(machine, RESIDENTS[name], recompute=recompute)
            site.run_local_steps(1, lambda _: None)
            numel = sum(p.numel() for p in site.parameters.values())
            rows.append(
                {
                    "what": f"R/E {name}, recompute {recompute}",
                    "state_mb": 16 * numel / 1e6,
                    "activations_mb": activation_bytes(machine, site) / 1e6,
                }
            )
    return rows


def activation_bytes(machine: Machine, site: Site) -> int:
    """On CPU what the graph keeps for the backward pass; on cuda the step's peak over its state."""
    if machine.device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        site.run_local_steps(1, lambda _: None)
        return torch.cuda.max_memory_allocated() - before
    kept: dict[int, int] = {}
    owned = {p.untyped_storage().data_ptr() for p in site.parameters.values()}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in owned:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    batch = torch.from_numpy(site.stream.next_batch(machine.step.batch))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        site.model(batch[:, :-1], batch[:, 1:])
    return sum(kept.values())
