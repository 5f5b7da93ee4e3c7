"""What a sync computes beside its transfers: codecs, and a whole mean, against a plain copy."""

from __future__ import annotations

from collections.abc import Callable

import torch

from bench.layers import Row
from bench.machine import Machine
from bench.timing import side_by_side
from fomoe.codecs import CODECS
from fomoe.segments import Bucket, Segment
from fomoe.sync.buckets import Contribution
from fomoe.sync.codec import decode, encode
from fomoe.sync.coder import Coder
from fomoe.sync.exchange import mean_over_holders
from fomoe.sync.transport import InMemoryTransport

NUMEL = 2**23  # 32 MiB of fp32: more than the caches hold
HOLDERS = (0, 1)


def sync_rows(machine: Machine, numel: int = NUMEL) -> list[Row]:
    """Encoding, decoding and the mean over two holders in memory, on the CPU.

    GB/s are of the fp32 values that a site has; a mean encodes and decodes for both sites.
    """
    values = torch.randn(numel) * 1e-3
    target = torch.empty_like(values)
    work: dict[str, Callable[[], object]] = {"copy": lambda: target.copy_(values)}
    for name, codec in CODECS.items():
        if codec.lossy:
            coded = encode(values, codec)
            work[f"encode {name}"] = lambda codec=codec: encode(values, codec)
            work[f"decode {name}"] = lambda codec=codec, coded=coded: decode(coded, numel, codec)
    for name in CODECS:
        work[f"mean {name}"] = mean_of_two(values, name)
    times = side_by_side(work, budget_s=machine.budget_s, clock=machine.clock)
    return [
        {
            "what": what,
            "ms": time.median * 1e3,
            "spread": time.spread,
            "gb_per_s": values.nbytes / time.median / 1e9,
            "over_copy": time.over(times["copy"]),
        }
        for what, time in times.items()
    ]


def mean_of_two(values: torch.Tensor, name: str) -> Callable[[], object]:
    """A whole sync of one bucket between two sites of one process, committed."""
    segment = Segment(
        "p", "p", (values.numel(),), 0, values.numel(), False, None, None, HOLDERS, HOLDERS, 0
    )
    bucket = Bucket(
        index=0, holders=HOLDERS, trainers=HOLDERS, is_expert=False, segments=(segment,)
    )
    transport = InMemoryTransport(HOLDERS)
    coder = Coder(CODECS[name], [bucket] if CODECS[name].lossy else [], HOLDERS)

    def contribute(bucket: Bucket, site: int) -> Contribution:
        return Contribution(bucket, [1.0], lambda segment, start, stop: values[start:stop])

    def step() -> None:
        mean_over_holders(transport, [bucket], contribute, coder)
        coder.commit()

    return step
