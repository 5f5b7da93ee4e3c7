"""megablocks: grouped products of an optional CUDA library (docs/performance.md: how to build it).

Only its products are used: its layers keep router losses in lists global to the module, and its
dispatch has no absent experts. Expert ids here are those of the resident experts.
"""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

from fomoe.errors import ConfigError
from fomoe.model.backends.base import Dispatch, Stacks
from fomoe.model.backends.stacked import GroupedProducts, run_stacked


@functools.cache
def load() -> Any:
    """The library's grouped products.

    Raises:
        ConfigError: saying what is missing.
    """
    field, value = "model.experts.backend", "megablocks"
    try:
        util = importlib.import_module("megablocks.grouped_gemm_util")
    except (ImportError, OSError, RuntimeError) as error:
        rule = f"cannot be imported ({error}); docs/performance.md says how to build it"
        raise ConfigError(field, value, rule) from None
    if not util.grouped_gemm_is_available():
        rule = "needs the package grouped_gemm; docs/performance.md says how to build it"
        raise ConfigError(field, value, rule)
    return util.backend


def _sizes(dispatch: Dispatch) -> Tensor:
    return torch.tensor(dispatch.counts, dtype=torch.int64)  # read on the host


def _forward(x: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    return load().gmm(x, w, _sizes(dispatch), trans_a=False, trans_b=True)


def _input_grad(y: Tensor, w: Tensor, dispatch: Dispatch) -> Tensor:
    return load().gmm(y, w, _sizes(dispatch), trans_a=False, trans_b=False)


def _weight_grad(y: Tensor, x: Tensor, dispatch: Dispatch) -> Tensor:
    """The library does not write the gradient of an expert without rows; here it becomes 0."""
    grads = load().gmm(y, x, _sizes(dispatch), trans_a=True, trans_b=False)
    for expert, count in enumerate(dispatch.counts):
        if not count:
            grads[expert].zero_()
    return grads


PRODUCTS = GroupedProducts(forward=_forward, input_grad=_input_grad, weight_grad=_weight_grad)


def run_megablocks(
    x_TD: Tensor,
    gate_A: Tensor,
    dispatch: Dispatch,
    stacks: Stacks,
    *,
    matmul: str,
    recompute: bool,
) -> Tensor:
    """See `Backend`."""
    return run_stacked(x_TD, gate_A, dispatch, stacks, PRODUCTS, recompute)
