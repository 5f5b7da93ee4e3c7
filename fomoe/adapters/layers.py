"""A frozen causal model of transformers with places for adapters.

All clients of a process share one base: a client's matrices are put in for the time of a pass.

Shapes: B batch, S sequence, D inputs, O outputs, r a client's rank, p the rank in use.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fomoe.adapters.base import read_base
from fomoe.adapters.nesting import scale_at
from fomoe.adapters.options import AdaptersConfig
from fomoe.adapters.shapes import A, B
from fomoe.errors import ConfigError
from fomoe.model.transformer import stable_seed

IGNORED = -100  # a target that is not learned
# transformers replaces functions of its classes while it reads; two threads that read at once leave
# them replaced, and later models lose their tied weights.
_ONE_AT_A_TIME = threading.Lock()
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


class LoraLinear(nn.Module):
    """y = W x + factor * B_p^T (A_p x), W frozen.

    Args:
        linear: the layer of the base.

    Attributes:
        merged: [out, in] that the server has added to W, None if nothing.
    """

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.linear = linear
        self.merged: Tensor | None = None
        self.put(None, None, 1.0)

    def put(self, a: Tensor | None, b: Tensor | None, factor: float | Tensor) -> None:
        """Use these matrices, [p, in] and [p, out], until others are put in.

        Args:
            factor: of the product; a tensor is [B, 1, p], for every sequence and dimension.
        """
        self._a, self._b, self._factor = a, b, factor

    def forward(self, x: Tensor) -> Tensor:
        y = self.linear(x)
        if self.merged is not None:
            y = y + F.linear(x.to(self.merged.dtype), self.merged).to(y.dtype)
        if self._a is None or self._b is None:
            return y
        h_BSp = F.linear(x.to(self._a.dtype), self._a)
        if isinstance(self._factor, Tensor):
            assert h_BSp.ndim == 3, "a rank per sequence needs a layer that sees sequences"
        return y + ((h_BSp * self._factor) @ self._b).to(y.dtype)


class AdaptedModel(nn.Module):
    """The base, frozen, with a `LoraLinear` in the place of every target.

    Args:
        adapters: the options.
        model: the causal model; its target layers are replaced.

    Attributes:
        layers: the adapted layers by the name of their module.

    Raises:
        ConfigError: if a target is no linear layer of the model.
    """

    def __init__(self, adapters: AdaptersConfig, model: nn.Module, targets: Iterable[str]) -> None:
        super().__init__()
        self.adapters = adapters
        self.model = model.requires_grad_(False).eval()
        self.layers: dict[str, LoraLinear] = {}
        modules = dict(model.named_modules())
        for name in targets:
            linear = modules.get(name)
            if not isinstance(linear, nn.Linear):
                rule = f"names {name}, which is no linear layer of the model"
                raise ConfigError("adapters.targets", list(adapters.targets), rule)
            parent, _, last = name.rpartition(".")
            layer = LoraLinear(linear)
            setattr(modules[parent], last, layer)
            self.layers[name] = layer

    def train(self, mode: bool = True) -> AdaptedModel:
        """The base has no dropout in training either; it stays as it is used."""
        return self

    def put(
        self, matrices: Mapping[str, Tensor], rank: int, row_ranks: Sequence[int] | None = None
    ) -> None:
        """Use these adapters, cut to a rank.

        Args:
            matrices: `<module>.lora_A` [r, in] and `<module>.lora_B` [r, out].
            rank: at most r; 0: the base alone.
            row_ranks: a rank of its own for every sequence of the batch, at most `rank`.
        """
        factor: float | Tensor = scale_at(self.adapters, rank) if rank else 0.0
        if row_ranks is not None:
            device = next(iter(matrices.values())).device
            rank_B = torch.tensor(row_ranks, device=device).view(-1, 1, 1)
            scales = [scale_at(self.adapters, rank) for rank in row_ranks]
            scale_B = torch.tensor(scales, device=device).view(-1, 1, 1)
            factor = scale_B * (torch.arange(rank, device=device) < rank_B)
        for name, layer in self.layers.items():
            if rank:
                a, b = matrices[f"{name}.{A}"][:rank], matrices[f"{name}.{B}"][:rank]
                layer.put(a, b, factor)
            else:
                layer.put(None, None, factor)

    def logits(self, tokens: Tensor) -> Tensor:
        """[B, S, V] with the adapters that are put in."""
        return self.model(input_ids=tokens, use_cache=False).logits

    def loss(self, windows: Tensor, *, reduction: str = "mean") -> Tensor:
        """Cross-entropy over the targets of coded windows (`inputs_and_targets`)."""
        inputs, targets = inputs_and_targets(windows)
        logits = self.logits(inputs).float()
        return F.cross_entropy(
            logits.flatten(0, 1), targets.flatten(), ignore_index=IGNORED, reduction=reduction
        )


def inputs_and_targets(windows: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and shifted targets, [B, S] each, of coded windows [B, S + 1].

    A token t that is read but not learned is coded as -1 - t: a prompt, or padding.
    """
    tokens = torch.where(windows < 0, -1 - windows, windows)
    targets = torch.where(windows < 0, IGNORED, windows)
    return tokens[:, :-1], targets[:, 1:]


def load_adapted(adapters: AdaptersConfig, device: torch.device) -> AdaptedModel:
    """Read the base from its folder and prepare its targets.

    Raises:
        ConfigError: if transformers is missing or cannot read the base.
    """
    assert adapters.base is not None
    base = read_base(adapters.base)
    model = read_model(adapters.base, base.folder, _DTYPES[adapters.base_dtype])
    return AdaptedModel(adapters, model.to(device), base.targets(adapters.targets))


def read_model(name: str, folder: Path, dtype: torch.dtype | str) -> nn.Module:
    """A causal model of transformers from a folder; dtype `auto` keeps the files' own.

    Raises:
        ConfigError: if transformers is missing or cannot read it.
    """
    try:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError:
        rule = "needs the extra: pip install 'fomoe[transformers]'"
        raise ConfigError("adapters.base", name, rule) from None
    logging.disable_progress_bar()
    try:
        with _ONE_AT_A_TIME:
            return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype)
    except Exception as error:  # transformers raises many kinds for a folder it cannot read
        reason = " ".join(str(error).split())[:200]
        raise ConfigError("adapters.base", name, f"cannot be read: {reason}") from None


def initial_matrix(name: str, shape: tuple[int, int], seed: int, round_idx: int = 0) -> Tensor:
    """The start of an adapter matrix: B is 0; A is drawn as PEFT draws it, equal at all clients.

    Args:
        name: `<module>.lora_A` or `<module>.lora_B`.
        shape: [R, width] with all rows, from which a client takes the first ones.
        round_idx: other numbers for adapters that start anew in a later round.
    """
    if name.endswith(B):
        return torch.zeros(shape)
    generator = torch.Generator().manual_seed(stable_seed(f"{seed}/{round_idx}/{name}"))
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape).uniform_(-bound, bound, generator=generator)
