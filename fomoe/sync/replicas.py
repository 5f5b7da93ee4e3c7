"""Whether the holders of a bucket have equal values, to the bit: they compare hashes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from fomoe.errors import SyncError
from fomoe.ranks import Ranks
from fomoe.segments import Bucket, Segment
from fomoe.sync.exchange import gather
from fomoe.sync.transport import Transport


def compare_replicas(
    transport: Transport,
    lanes: Mapping[int, Sequence[Bucket]],
    views: Mapping[int, Callable[[Segment], Tensor]],
) -> dict[int, str]:
    """Compare hashes of these buckets between their holders.

    Args:
        lanes: the buckets that each lane of this rank has, by the lane's number.
        views: a segment's values, by site of this process.

    Returns:
        The hash of each bucket that is held here, by index.

    Raises:
        SyncError: naming the first bucket whose replicas differ, and its holders.
    """
    problem, texts = "", {}
    for lane, (number, buckets) in zip(transport.lanes, lanes.items(), strict=True):
        found, texts[number] = _compare(lane, buckets, views)
        problem = problem or found
    # Each lane has a rank of every site, which tells the others: all ranks raise, or none does.
    if said := next(filter(None, transport.inside.gather(problem.encode())), b""):
        raise SyncError(said.decode())
    return _of_all_lanes(transport.inside, texts)


def _compare(
    transport: Transport,
    buckets: Sequence[Bucket],
    views: Mapping[int, Callable[[Segment], Tensor]],
) -> tuple[str, dict[int, str]]:
    """What is wrong in a lane, if anything is, and its hashes by bucket."""
    own = {index: replica_hashes(buckets, index, view) for index, view in views.items()}
    messages = gather(transport, lambda site: b"".join(own[site].values()))
    size = hashlib.sha256().digest_size
    by_bucket: dict[int, set[bytes]] = {bucket.index: set() for bucket in buckets}
    for site, message in zip(transport.members, messages, strict=True):
        held = [bucket.index for bucket in buckets if site in bucket.holders]
        for position, index in enumerate(held):
            by_bucket[index].add(message[position * size : (position + 1) * size])
    problem = ""
    wrong = [bucket for bucket in buckets if len(by_bucket[bucket.index]) > 1]
    if wrong:
        problem = (
            f"replicas differ after a sync: bucket {wrong[0].index} "
            f"({wrong[0].segments[0].name}, ...) is not equal at its holders "
            f"{list(wrong[0].holders)}"
        )
    return problem, {i: digest.hex() for hashes in own.values() for i, digest in hashes.items()}


def _of_all_lanes(inside: Ranks, own: Mapping[int, dict[int, str]]) -> dict[int, str]:
    """Hashes of a site's buckets, from those of every lane's rows of them."""
    if inside.size == 1 and len(own) == 1:
        return next(iter(own.values()))
    found: dict[int, dict[str, str]] = {}
    for message in inside.gather(json.dumps(own).encode()):
        found |= {int(number): texts for number, texts in json.loads(message).items()}
    of_lanes = [found[number] for number in sorted(found)]
    indices = sorted({int(index) for texts in of_lanes for index in texts})
    whole = {i: "".join(texts.get(str(i), "") for texts in of_lanes) for i in indices}
    return {i: hashlib.sha256(text.encode()).hexdigest() for i, text in whole.items()}


def replica_hashes(
    buckets: Iterable[Bucket], site: int, view: Callable[[Segment], Tensor]
) -> dict[int, bytes]:
    """sha256 of a site's values of each of these buckets that it holds, by bucket index."""
    hashes = {}
    for bucket in buckets:
        if site in bucket.holders:
            digest = hashlib.sha256()
            for segment in bucket.at(site).segments:
                value = view(segment).to("cpu", torch.float32).contiguous()
                digest.update(memoryview(value.reshape(-1).numpy()))
            hashes[bucket.index] = digest.digest()
    return hashes
