"""What is measured on: device, dtype, shapes that fit it, and how busy it is."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from fomoe.model.matmul import onednn_is_faster


@dataclass(frozen=True, kw_only=True)
class LayerShape:
    """One MoE layer; T tokens of width D, E experts of hidden width F, top-k."""

    tokens: int
    width: int
    hidden: int
    num_experts: int
    top_k: int

    @property
    def name(self) -> str:
        return f"d{self.width} f{self.hidden} E{self.num_experts} top-{self.top_k} T{self.tokens}"

    @property
    def flops(self) -> int:
        """Forward and backward of the experts' products, all assignments executed."""
        return self.tokens * self.top_k * 18 * self.width * self.hidden


@dataclass(frozen=True, kw_only=True)
class StepShape:
    """A whole training step."""

    layers: int
    width: int
    heads: int
    hidden: int
    num_experts: int
    top_k: int
    vocab: int
    seq_len: int
    batch: int


@dataclass(frozen=True, kw_only=True)
class Machine:
    """Where the benchmark runs, and its shapes."""

    device: torch.device
    dtype: torch.dtype
    layers: tuple[LayerShape, ...]
    step: StepShape
    budget_s: float  # per group of candidates that are timed side by side
    clock: str = "wall"  # or cpu

    @property
    def kind(self) -> str:
        if self.device.type == "cuda":
            return f"{torch.cuda.get_device_name(self.device)}, {self.dtype}"
        vectors = torch.backends.cpu.get_cpu_capability()
        products = "onednn" if onednn_is_faster() else "torch"
        return (
            f"{torch.get_num_threads()} CPU threads, {vectors}, products {products}, {self.dtype}"
        )


def find_machine(device: str, threads: int | None, clock: str) -> Machine:
    """An accelerator in bf16 if there is one, else the CPU in fp32."""
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if threads:
        torch.set_num_threads(threads)
    if device == "cpu":
        shapes = ((8, 2), (64, 2), (8, 8), (64, 8))
        layers = tuple(
            LayerShape(tokens=4096, width=256, hidden=512, num_experts=e, top_k=k)
            for e, k in shapes
        )
        step = StepShape(
            layers=4, width=256, heads=4, hidden=512, num_experts=8, top_k=2, vocab=512,
            seq_len=512, batch=8,
        )  # fmt: skip
        return Machine(
            device=torch.device("cpu"),
            dtype=torch.float32,
            layers=layers,
            step=step,
            budget_s=6,
            clock=clock,
        )
    layers = tuple(
        LayerShape(tokens=32768, width=2048, hidden=1024, num_experts=e, top_k=k)
        for e, k in ((8, 2), (64, 8))
    )
    step = StepShape(
        layers=8, width=2048, heads=16, hidden=1024, num_experts=64, top_k=8, vocab=50304,
        seq_len=2048, batch=8,
    )  # fmt: skip
    return Machine(
        device=torch.device(device),
        dtype=torch.bfloat16,
        layers=layers,
        step=step,
        budget_s=4,
        clock=clock,
    )


def load_average() -> float:
    """Runnable tasks of the last minute; above the number of cores, times are of a busy machine."""
    return os.getloadavg()[0]
