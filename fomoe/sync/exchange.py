"""Operations over several sites, for any transport: reduce, gather, agree, share, fetch.

Each is written once, as messages between members; a transport only moves them. The payload, what a
site puts into an operation, is counted here; the transport counts the bytes that a site sends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import TypeVar

import torch
from torch import Tensor

from fomoe.errors import FomoeError, SiteMismatchError, SyncError
from fomoe.segments import Bucket
from fomoe.sync.buckets import Chunk, Contribution, chunks_of, divide_by_weights, reduce_chunk
from fomoe.sync.transport import Message, Transport

T = TypeVar("T")

# The contribution of one of this process's sites to a bucket.
Contribute = Callable[[Bucket, int], Contribution]


# ------------------------------------------------------------------------------------------ reduce


def mean_over_holders(
    transport: Transport, buckets: Sequence[Bucket], contribute: Contribute
) -> dict[int, Tensor]:
    """Weighted means of the buckets that sites of this process hold, by bucket index.

    Every holder sends each chunk to the chunk's owner, which sums it in site order and sends the
    sum to the others. The values that `contribute` reads are not changed.

    Args:
        buckets: the same at every member.

    Raises:
        SyncError: if an exchange failed.
    """
    own = {
        (bucket.index, site): contribute(bucket, site)
        for bucket in buckets
        for site in bucket.holders
        if site in transport.sites
    }
    weights = _sum_weights(transport, buckets, own)
    values = {
        bucket.index: torch.empty(bucket.numel) for bucket in buckets if bucket.index in weights
    }
    chunks = [chunk for bucket in buckets for chunk in chunks_of(bucket)]
    # Over a network all chunks are exchanged at once, so that no site waits for a peer that is busy
    # with another one. In one process they are summed one by one: few contributions exist at once.
    for batch in [chunks] if transport.remote else [[chunk] for chunk in chunks]:
        _sum_chunks(transport, batch, own, values)
    for bucket in buckets:
        for site in set(bucket.holders) & set(transport.sites) if len(bucket.holders) > 1 else ():
            counts, index = transport.counts[site], bucket.index
            counts.add(_class(bucket), payload=values[index].nbytes, wire=0)
            counts.add("control", payload=own[index, site].weights.nbytes, wire=0)
    return {
        bucket.index: divide_by_weights(bucket, values[bucket.index], weights[bucket.index])
        for bucket in buckets
        if bucket.index in values
    }


def _class(bucket: Bucket) -> str:
    return "expert" if bucket.is_expert else "shared"


def _sum_weights(
    transport: Transport, buckets: Sequence[Bucket], own: dict[tuple[int, int], Contribution]
) -> dict[int, Tensor]:
    """Sums of the contribution weights, by bucket index, where a site of this process holds it."""
    messages = [
        Message(
            source,
            target,
            own[bucket.index, source].weights if source in transport.sites else None,
            (len(bucket.segments),),
            torch.float64,
            "control",
        )
        for bucket in buckets
        for source, target in product(bucket.holders, repeat=2)
    ]
    moved = iter(transport.move("exchanging weights", messages))
    sums: dict[int, Tensor] = {}
    for bucket in buckets:
        by_source = [[next(moved) for _ in bucket.holders] for _ in bucket.holders]
        for received in zip(*by_source, strict=True):  # at one target
            weights = [weight for weight in received if weight is not None]
            if weights:
                sums[bucket.index] = reduce_chunk(weights)
    return sums


def _sum_chunks(
    transport: Transport,
    batch: list[Chunk],
    own: dict[tuple[int, int], Contribution],
    values: dict[int, Tensor],
) -> None:
    """Fill `values` with the sums of a batch of chunks."""
    to_owner = [
        Message(
            source,
            chunk.owner,
            own[chunk.bucket.index, source].values(chunk.start, chunk.stop)
            if source in transport.sites
            else None,
            (chunk.stop - chunk.start,),
            torch.float32,
            _class(chunk.bucket),
        )
        for chunk in batch
        for source in chunk.bucket.holders
    ]
    moved = iter(transport.move("summing over the holders", to_owner))
    del to_owner  # frees this process's contributions
    from_owner = []
    for chunk in batch:
        parts = [part for part in (next(moved) for _ in chunk.bucket.holders) if part is not None]
        total = reduce_chunk(parts) if chunk.owner in transport.sites else None
        held = values.get(chunk.bucket.index)
        into = None if held is None else held[chunk.start : chunk.stop]
        if total is not None:
            assert into is not None
            into.copy_(total)
        from_owner += [
            Message(
                chunk.owner,
                target,
                None if total is None else into,
                (chunk.stop - chunk.start,),
                torch.float32,
                _class(chunk.bucket),
                into,
            )
            for target in chunk.bucket.holders
            if target != chunk.owner
        ]
    transport.move("summing over the holders", from_owner)


# -------------------------------------------------------------------------------- gather and agree


def gather(transport: Transport, message: Callable[[int], bytes]) -> list[bytes]:
    """One control message per member, in site order, at every member."""
    members = transport.members
    own = {site: message(site) for site in transport.sites}
    tensors = {site: _as_tensor(text) for site, text in own.items()}
    pairs = list(product(members, repeat=2))
    what = "exchanging messages"
    lengths = transport.move(
        what,
        [
            Message(
                a,
                b,
                torch.tensor([len(own[a])]) if a in own else None,
                (1,),
                torch.int64,
                "control",
            )
            for a, b in pairs
        ],
    )
    sizes = {a: int(n) for (a, _), n in zip(pairs, lengths, strict=True) if n is not None}
    moved = transport.move(
        what,
        [Message(a, b, tensors.get(a), (sizes[a],), torch.uint8, "control") for a, b in pairs],
    )
    for site, text in own.items():
        transport.counts[site].add("control", payload=len(text) + 8, wire=0)
    found = {a: t for (a, _), t in zip(pairs, moved, strict=True) if t is not None}
    return [own[m] if m in own else found[m].numpy().tobytes() for m in members]


def _as_tensor(text: bytes) -> Tensor:
    if not text:
        return torch.empty(0, dtype=torch.uint8)
    return torch.frombuffer(bytearray(text), dtype=torch.uint8)


def check_sites(
    transport: Transport,
    problem: Callable[[int], str],
    error: type[FomoeError] = SyncError,
) -> None:
    """Raise at every member if any site has a problem: all sites continue, or none does.

    Args:
        problem: says what is wrong with a site of this process; empty if nothing is.

    Raises:
        FomoeError: of the kind given, naming the sites and their problems.
    """
    answers = gather(transport, lambda site: problem(site).encode())
    problems = [
        f"site {site}: {answer.decode()}"
        for site, answer in zip(transport.members, answers, strict=True)
        if answer
    ]
    if problems:
        raise error("; ".join(problems))


def agreed(transport: Transport, work: Callable[[], T]) -> T:
    """Run `work` in every process; if it fails in one, all raise instead of waiting for it.

    Raises:
        FomoeError: this process's own error, or one that names the sites that failed.
    """
    failure: FomoeError | None = None
    try:
        result = work()
    except FomoeError as error:
        failure = error
    try:
        check_sites(transport, lambda _: str(failure or ""), SiteMismatchError)
    except SiteMismatchError:
        if failure is not None:
            raise failure from None
        raise
    return result


def share(transport: Transport, make: Callable[[], bytes]) -> bytes:
    """Run `make` at the first member and return its bytes at every member."""
    first = transport.members[0]
    made = agreed(transport, lambda: make() if first in transport.sites else b"")
    return gather(transport, lambda site: made if site == first else b"")[0]


# ------------------------------------------------------------------------------------------- fetch


@dataclass(frozen=True)
class Item:
    """A tensor that some sites hold and others want to read.

    Attributes:
        name: the argument of `read`.
        shape: its shape; fp32.
        holders: sites that have it; the first sends it.
    """

    name: str
    shape: tuple[int, ...]
    holders: tuple[int, ...]


def fetch(
    transport: Transport, items: Iterable[Item], read: Callable[[int, str], Tensor]
) -> dict[str, Tensor]:
    """Every item by name: read from a site of this process that holds it, otherwise received."""
    found: dict[str, Tensor] = {}
    messages, names = [], []
    for item in items:
        local = [site for site in item.holders if site in transport.sites]
        if local:
            found[item.name] = read(local[0], item.name)
        source = item.holders[0]
        own = None
        if source in transport.sites:
            own = found[item.name].detach().float().cpu().contiguous()
        peers = [member for member in transport.members if member not in item.holders]
        for peer in peers:
            messages.append(Message(source, peer, own, item.shape, torch.float32, "evaluation"))
            names.append(item.name)
        if own is not None:
            transport.counts[source].add("evaluation", payload=own.nbytes * len(peers), wire=0)
    moved = transport.move("fetching experts for evaluation", messages)
    for name, tensor in zip(names, moved, strict=True):
        if tensor is not None:
            found.setdefault(name, tensor)
    return found
