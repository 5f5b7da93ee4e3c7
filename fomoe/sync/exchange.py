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
from fomoe.sync.buckets import (
    Chunk,
    Contribution,
    chunks_of,
    divide_by_weights,
    reduce_chunk,
    weigh,
)
from fomoe.sync.coder import Coder
from fomoe.sync.transport import Message, Transport

T = TypeVar("T")

# The contribution of one of this process's sites to a bucket.
Contribute = Callable[[Bucket, int], Contribution]


# ------------------------------------------------------------------------------------------ reduce


def mean_over_holders(
    transport: Transport,
    buckets: Sequence[Bucket],
    contribute: Contribute,
    coder: Coder | None = None,
) -> dict[int, Tensor]:
    """Weighted means of the buckets that sites of this process hold, by bucket index.

    Every holder sends each chunk to the chunk's owner, which sums it in site order and sends the
    mean to the others, encoded once. Every holder takes what the others decode, so all get the
    same. The values that `contribute` reads are not changed.

    Args:
        buckets: the same at every member.
        coder: encodes what crosses; None: it crosses in fp32.

    Raises:
        SyncError: if an exchange failed.
    """
    coder = coder or Coder()
    own = {
        (bucket.index, site): contribute(bucket, site)
        for bucket in buckets
        for site in bucket.holders
        if site in transport.sites
    }
    weights = _exchange_weights(transport, buckets, own)
    means = {
        bucket.index: torch.empty(bucket.numel) for bucket in buckets if bucket.index in weights
    }
    chunks = [chunk for bucket in buckets for chunk in chunks_of(bucket)]
    # Over a network all chunks are exchanged at once, so that no site waits for a peer that is busy
    # with another one. In one process they are summed one by one: few contributions exist at once.
    for batch in [chunks] if transport.remote else [[chunk] for chunk in chunks]:
        _average_chunks(transport, batch, own, weights, means, coder)
    for bucket in buckets:
        for site in set(bucket.holders) & set(transport.sites) if len(bucket.holders) > 1 else ():
            counts, index = transport.counts[site], bucket.index
            size = sum(coder.codec.num_bytes(chunk.numel) for chunk in chunks_of(bucket))
            counts.add(_class(bucket), payload=size, wire=0)
            counts.add("control", payload=own[index, site].weights.nbytes, wire=0)
    return means


def _class(bucket: Bucket) -> str:
    return "expert" if bucket.is_expert else "shared"


def _exchange_weights(
    transport: Transport, buckets: Sequence[Bucket], own: dict[tuple[int, int], Contribution]
) -> dict[int, list[Tensor]]:
    """The holders' contribution weights, by bucket index, where a site of this process holds it."""
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
    found: dict[int, list[Tensor]] = {}
    for bucket in buckets:
        by_source = [[next(moved) for _ in bucket.holders] for _ in bucket.holders]
        for received in zip(*by_source, strict=True):  # at one target
            weights = [weight for weight in received if weight is not None]
            if weights:
                found[bucket.index] = weights
    return found


def _average_chunks(
    transport: Transport,
    batch: list[Chunk],
    own: dict[tuple[int, int], Contribution],
    weights: dict[int, list[Tensor]],
    means: dict[int, Tensor],
    coder: Coder,
) -> None:
    """Fill `means` with the means of a batch of chunks."""
    to_owner = []
    for chunk in batch:
        for source in chunk.bucket.holders:
            tensor, crosses = None, source != chunk.owner
            if source in transport.sites:
                share = own[chunk.bucket.index, source]
                tensor = share.values(chunk.start, chunk.stop)
                if crosses:
                    tensor = coder.encode(chunk, source, tensor, share.weights)
            form = coder.form(chunk, encoded=crosses)
            to_owner.append(Message(source, chunk.owner, tensor, *form, _class(chunk.bucket)))
    moved = iter(transport.move("summing over the holders", to_owner))
    del to_owner  # frees this process's contributions
    from_owner: list[Message] = []
    places: list[tuple[Chunk, Tensor | None]] = []
    for chunk in batch:
        holders = chunk.bucket.holders
        received = [part for part in (next(moved) for _ in holders) if part is not None]
        mean = means.get(chunk.bucket.index)
        into = None if mean is None else mean[chunk.start : chunk.stop]
        sent = None
        if chunk.owner in transport.sites:
            assert into is not None
            sent = _mean_of_chunk(chunk, received, weights[chunk.bucket.index], into, coder)
        peers = [target for target in holders if target != chunk.owner]
        form = coder.form(chunk, encoded=True)
        direct = None if coder.codec.lossy else into
        kind = _class(chunk.bucket)
        from_owner += [Message(chunk.owner, p, sent, *form, kind, direct) for p in peers]
        places += [(chunk, into)] * len(peers)
    arrived = transport.move("summing over the holders", from_owner)
    for (chunk, into), tensor in zip(places, arrived, strict=True):
        if coder.codec.lossy and tensor is not None and chunk.owner not in transport.sites:
            assert into is not None
            into.copy_(coder.decode(chunk, tensor))


def _mean_of_chunk(
    chunk: Chunk, received: list[Tensor], weights: list[Tensor], into: Tensor, coder: Coder
) -> Tensor:
    """Average a chunk at its owner, write what every holder takes, and return what is sent."""
    holders = chunk.bucket.holders
    parts = [
        weigh(chunk, part if source == chunk.owner else coder.decode(chunk, part), weight)
        for source, part, weight in zip(holders, received, weights, strict=True)
    ]
    total = reduce_chunk(weights)
    mean = divide_by_weights(chunk, reduce_chunk(parts, into), total)
    if len(holders) == 1 or not coder.codec.lossy:
        return mean
    sent = coder.encode(chunk, chunk.owner, mean, total)
    into.copy_(coder.decode(chunk, sent))
    return sent


# -------------------------------------------------------------------------------- gather and agree


def gather(transport: Transport, message: Callable[[int], bytes]) -> list[bytes]:
    """One control message per member, in site order, at every member.

    Ranks of a site that have other lanes pass the same message.
    """
    own = {site: message(site) for site in transport.sites}
    found = [_gather(lane, own) for lane in transport.lanes]  # equal, and every lane takes part
    return found[0]


def _gather(transport: Transport, own: dict[int, bytes]) -> list[bytes]:
    members = transport.members
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

    A problem of one rank of a site is the site's, and is raised at all ranks.

    Args:
        problem: says what is wrong with a site of this process; empty if nothing is.

    Raises:
        FomoeError: of the kind given, naming the sites and their problems.
    """

    def of_ranks(site: int) -> bytes:
        own = problem(site)
        if own and transport.inside.size > 1:
            own = f"rank {transport.inside.rank}: {own}"
        return next(filter(None, transport.inside.gather(own.encode())), b"")

    answers = gather(transport, of_ranks)
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
    """Run `make` in the first process of the first member and return its bytes in every process."""
    first, inside = transport.members[0], transport.inside
    makes = first in transport.sites and inside.rank == 0
    made = agreed(transport, lambda: make() if makes else b"")
    return inside.gather(gather(transport, lambda site: made if site == first else b"")[0])[0]


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
