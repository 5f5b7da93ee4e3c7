"""Which backend computes the experts; one that cannot is refused with the reason."""

from __future__ import annotations

import torch

from fomoe.config import ModelConfig
from fomoe.errors import ConfigError
from fomoe.model.backends import megablocks
from fomoe.model.backends.base import Backend
from fomoe.model.backends.grouped_mm import ALIGNMENT_BYTES, run_grouped_mm
from fomoe.model.backends.split import run_split

BACKENDS: dict[str, Backend] = {
    "split": run_split,
    "grouped_mm": run_grouped_mm,
    "megablocks": megablocks.run_megablocks,
}


def choose_backend(model: ModelConfig, device: torch.device, dtype: torch.dtype) -> str:
    """Name of the backend for products of `dtype` on `device`.

    `auto` takes grouped_mm where it is one kernel (bf16, compute capability 9 and newer), else
    split.

    Raises:
        ConfigError: if the requested backend cannot run this model here.
    """
    asked = model.experts.backend
    if asked == "auto":
        grouped = (
            device.type == "cuda"
            and dtype == torch.bfloat16
            and torch.cuda.get_device_capability(device) >= (9, 0)
            and not _misaligned(model, dtype)
        )
        return "grouped_mm" if grouped else "split"
    if asked == "grouped_mm":
        if misaligned := _misaligned(model, dtype):
            raise ConfigError("model.experts.backend", asked, f"needs {misaligned}")
        if device.type == "cuda" and dtype != torch.bfloat16:
            raise ConfigError("model.experts.backend", asked, "needs bf16 on cuda")
    if asked == "megablocks":
        if device.type != "cuda" or dtype != torch.bfloat16:
            raise ConfigError("model.experts.backend", asked, "needs bf16 on cuda")
        megablocks.load()
    return asked


def _misaligned(model: ModelConfig, dtype: torch.dtype) -> str:
    """The rule that a width breaks; empty if all widths fit."""
    multiple = ALIGNMENT_BYTES // dtype.itemsize
    widths = {"model.d_model": model.d_model, "model.expert_ffn_dim": model.expert_width}
    wrong = [f"{name} {width}" for name, width in widths.items() if width % multiple]
    return f"widths that are multiples of {multiple} in {dtype}, not {wrong[0]}" if wrong else ""
