"""Encoding and decoding of fp32 vectors of any length, on the CPU.

A block with scale s has codes q with |q| <= 127 (int8) or 7 (int4); it decodes to q x s, and a
value differs from that by at most s / 2. The scale is the largest value over the largest code,
rounded up to bf16, so that q x s is exact in fp32. A block with a value that is not finite decodes
to NaN.
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

from fomoe.codecs import BLOCK, SCALE_BYTES, Codec

# The smallest normal number: no result depends on whether a machine keeps smaller ones.
_LEAST_SCALE = 2.0**-126
_PIECE = 2048 * BLOCK  # elements that are encoded at once: they stay in a core's cache


def encode(values: Tensor, codec: Codec) -> Tensor:
    """Encode fp32 [n] as uint8 [codec.num_bytes(n)]; of a codec without loss, the values."""
    if not codec.lossy:
        return values
    if not codec.scaled:
        return values.to(torch.bfloat16).view(torch.uint8)
    out = torch.empty(codec.num_bytes(values.numel()), dtype=torch.uint8)
    for part, coded in _pieces(values, out, codec):
        scales = _scales(part, codec)
        codes = (part / scales[:, None]).round_()
        if not scales.isfinite().all():
            codes.nan_to_num_(0)  # what a NaN is as a whole number depends on the machine
        coded[:, :SCALE_BYTES] = scales.to(torch.bfloat16).view(torch.uint8).view(-1, SCALE_BYTES)
        coded[:, SCALE_BYTES:] = _pack(codes, codec)
    return out


def decode(encoded: Tensor, numel: int, codec: Codec) -> Tensor:
    """The fp32 [numel] values of an encoded vector."""
    if not codec.lossy:
        return encoded
    if not codec.scaled:
        return encoded.view(torch.bfloat16).float()
    out = torch.empty(numel)
    for part, coded in _pieces(out, encoded, codec):
        scales = coded[:, :SCALE_BYTES].flatten().view(torch.bfloat16).float()
        part.copy_(_unpack(coded[:, SCALE_BYTES:], part.shape[1], codec)).mul_(scales[:, None])
    return out


def _pieces(values: Tensor, encoded: Tensor, codec: Codec) -> list[tuple[Tensor, Tensor]]:
    """Views of both vectors, [blocks, elements] and [blocks, bytes]; the last is the rest."""
    numel, found = values.numel(), []
    whole = numel - numel % BLOCK
    edges = [*range(0, whole, _PIECE), whole, numel]
    for start, stop in pairwise(edges):
        if start < stop:
            width = min(BLOCK, stop - start)
            own = encoded[codec.num_bytes(start) : codec.num_bytes(stop)]
            found.append((values[start:stop].view(-1, width), own.view(-1, codec.num_bytes(width))))
    return found


def _scales(blocks: Tensor, codec: Codec) -> Tensor:
    """The scale of every block, fp32 [blocks] of bf16's precision."""
    largest = blocks.abs().amax(dim=1)  # NaN if any value is; aminmax takes ten times as long
    scales = largest.div_(2 ** (codec.bits - 1) - 1).clamp_min_(_LEAST_SCALE)
    finite = torch.isfinite(scales)
    up = (scales.view(torch.int32) + 0xFFFF) & ~0xFFFF  # of a positive number: away from 0
    return torch.where(finite, up.view(torch.float32), torch.nan)


def _pack(codes: Tensor, codec: Codec) -> Tensor:
    """Whole numbers [blocks, elements] as bytes; int4 puts an element of each half into a byte."""
    if codec.bits == 8:
        return codes.to(torch.int8).view(torch.uint8)
    codes = codes.add_(8).to(torch.uint8)
    if codes.shape[1] % 2:
        codes = torch.nn.functional.pad(codes, (0, 1))
    half = codes.shape[1] // 2
    return codes[:, :half] | (codes[:, half:] << 4)


def _unpack(coded: Tensor, width: int, codec: Codec) -> Tensor:
    """The whole numbers [blocks, width] of packed bytes."""
    if codec.bits == 8:
        return coded.view(torch.int8)
    both = torch.cat([coded & 15, coded >> 4], dim=1)
    return both[:, :width].to(torch.int8) - 8
