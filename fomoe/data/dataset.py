"""The split: a held-out part by document, equal at all sites, and disjoint parts for the sites."""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

from fomoe.config import Config
from fomoe.data import sources
from fomoe.data.clusters import deal_by_kind
from fomoe.data.sources import Document
from fomoe.data.stream import HubStream, Stream, TokenStream, encode_document, hub_text
from fomoe.data.tokenizer import Tokenizer, load_tokenizer, parse_bpe, train_bpe
from fomoe.errors import ConfigError, DataError
from fomoe.textfile import why_no_file

_SHARD_BLOCK_WINDOWS = 64  # windows in one block of a token shard; a block is its "document"


@dataclass(frozen=True, kw_only=True)
class Data:
    """What a process trains and evaluates on.

    Attributes:
        streams: one per site of this process.
        held_out: int64 [sequences, seq_len + 1], equal at all sites.
        unigram_entropy: entropy in nats of the held-out part's own token frequencies: the best
            that a model without context could do.
        fingerprints: hashes that must be equal at all sites.
        tokenizer_json: the trained tokenizer's file, None if none was trained.
        own_held_out: as `held_out`, of one client's own examples; with adapters only.
    """

    streams: dict[int, Stream]
    held_out: np.ndarray
    unigram_entropy: float
    fingerprints: dict[str, str]
    tokenizer_json: bytes | None
    own_held_out: dict[int, np.ndarray] = field(default_factory=dict)


@dataclass(frozen=True)
class _Part:
    """A source after the split: training blocks per shard, held-out tokens, a digest."""

    make_stream: Callable[[int, int, str], Stream]  # (shard, num_shards, name) -> stream
    held_out: np.ndarray
    digest: bytes


def build_data(
    config: Config,
    sites: Iterable[int],
    *,
    tokenizer_dir: Path | None = None,
    share: Callable[[Callable[[], bytes]], bytes] = lambda make: make(),
) -> Data:
    """Read the sources and split them.

    Args:
        config: the experiment.
        sites: the sites of this process; only their part is tokenized.
        tokenizer_dir: folder of the run that is resumed: its trained tokenizer is used, if it has
            one. A new run trains its own.
        share: runs a function at site 0 and returns its bytes at all sites.

    Raises:
        DataError, ConfigError: if a source, tokenizer or split cannot be used.
    """
    names = _names(config)
    tokenizer, tokenizer_json = _build_tokenizer(config, names, tokenizer_dir, share)
    parts: dict[str, _Part] = {}
    streams: dict[int, Stream] = {}
    sites = tuple(sites)
    everywhere = config.data.held_out is None  # then it comes from every source
    for source in sorted(set(names) if everywhere else {names[site] for site in sites}):
        parts[source] = _open_part(config, source, tokenizer, held_out=everywhere)
    for site in sites:
        sharers = [s for s, name in enumerate(names) if name == names[site]]
        name = f"the training text of site {site}"
        streams[site] = parts[names[site]].make_stream(sharers.index(site), len(sharers), name)
    if config.data.held_out is None:
        held_out = [parts[source].held_out for source in sorted(set(names))]
    else:
        held_out = [_whole(config, config.data.held_out, tokenizer)]
    windows = _held_out_windows(config, held_out)
    return Data(
        streams=streams,
        held_out=windows,
        unigram_entropy=entropy(np.bincount(windows[:, 1:].ravel())),
        fingerprints=_fingerprints(config, tokenizer, parts, windows),
        tokenizer_json=tokenizer_json,
    )


def needed_sources(config: Config, sites: Iterable[int]) -> list[str]:
    """Sources that a process with these sites reads."""
    names, data = _names(config), config.data
    own = {names[site] for site in sites}
    # At site 0, a tokenizer is trained on every source.
    everywhere = data.held_out is None or (data.tokenizer == "bpe" and 0 in sites)
    return sorted({*(names if everywhere else own), *([data.held_out] if data.held_out else [])})


def _names(config: Config) -> tuple[str, ...]:
    """The source of every part of the text, including parts that no site trains on.

    Those are split, held out and tokenized as well, so that methods with fewer sites are evaluated
    on the same text.
    """
    num_shards = config.data.num_shards or config.num_sites
    return config.data.sites or (config.data.source,) * num_shards


def entropy(counts: np.ndarray) -> float:
    """Entropy in nats of a distribution given by counts."""
    p = counts[counts > 0] / counts.sum()
    return float(-(p * np.log(p)).sum())


# -------------------------------------------------------------------------------------- tokenizer


def _build_tokenizer(
    config: Config,
    names: tuple[str, ...],
    kept_in: Path | None,
    share: Callable[[Callable[[], bytes]], bytes],
) -> tuple[Tokenizer | None, bytes | None]:
    data = config.data
    if data.tokenizer == "none":
        return None, None
    if data.tokenizer != "bpe":
        return named_tokenizer(config), None

    def train() -> bytes:
        kept = _kept_bpe(kept_in)
        if kept is not None:
            return kept
        documents = [
            document
            for source in sorted(set(names))
            for document in _split(config, _documents(config, source))[1]
        ]
        return train_bpe((document.text for document in documents), data.bpe_vocab_size)

    tokenizer_json = share(train)
    return parse_bpe(tokenizer_json), tokenizer_json


def named_tokenizer(config: Config) -> Tokenizer:
    """The tokenizer that the config names.

    Raises:
        DataError, ConfigError: if it cannot be loaded, or has more tokens than the model.
    """
    tokenizer = load_tokenizer(config.data.tokenizer)
    if tokenizer.vocab_size > config.vocab_size:
        rule = f"is below the tokenizer's {tokenizer.vocab_size} tokens"
        raise ConfigError("model.vocab_size", config.vocab_size, rule)
    return tokenizer


def run_tokenizer(config: Config, run_dir: Path, fingerprint: str | None) -> Tokenizer | None:
    """The tokenizer that a run was trained with; None for a run on token shards.

    Args:
        fingerprint: the one that the run's checkpoint names; None: not compared.

    Raises:
        DataError, ConfigError: if it cannot be loaded, or is another one now.
    """
    if config.data.tokenizer == "none":
        return None
    if config.data.tokenizer == "bpe":
        path = run_dir / "tokenizer.json"
        if problem := why_no_file(path):
            raise DataError(f"the run's tokenizer {path} {problem}; it is in the folder of site 0")
        tokenizer = parse_bpe(path.read_bytes())
    else:
        tokenizer = named_tokenizer(config)
    if fingerprint is not None and tokenizer.fingerprint != fingerprint:
        raise DataError(
            f"data.tokenizer {config.data.tokenizer} is not the one that {run_dir} was trained with"
        )
    return tokenizer


def _kept_bpe(folder: Path | None) -> bytes | None:
    """The tokenizer that a run keeps, or None: a damaged one is trained anew on the same text.

    A resume compares its hash with the checkpoint's, so another tokenizer is refused.
    """
    if folder is None:
        return None
    try:
        kept = (folder / "tokenizer.json").read_bytes()
        parse_bpe(kept)
    except (OSError, DataError):
        return None
    return kept


# -------------------------------------------------------------------------------------- the split


def _documents(config: Config, source: str) -> list[Document]:
    return sources.read_documents(source, text_field=config.data.text_field)


def _open_part(config: Config, source: str, tokenizer: Tokenizer | None, held_out: bool) -> _Part:
    if sources.is_shards(source):
        return _shard_part(config, source, held_out)
    assert tokenizer is not None  # check_config allows no tokenizer for shards only
    if sources.is_hub(source):
        return _hub_part(config, source, tokenizer, held_out)
    return _text_part(config, source, tokenizer, held_out)


def _split(config: Config, documents: list[Document]) -> tuple[list[Document], list[Document]]:
    """Held-out and training documents, by the hash of seed and content: equal texts stay together.

    Nothing else matters, so every site computes the same split without communication.
    """
    key = str(config.seed).encode()
    ordered = sorted(documents, key=lambda d: hashlib.sha256(key + d.digest).digest())
    if config.data.held_out is not None:
        return [], ordered
    wanted = config.data.held_out_fraction * sum(len(d.text) for d in ordered)
    total, count = 0, 0
    while count < len(ordered) and (total < wanted or ordered[count] == ordered[count - 1]):
        total += len(ordered[count].text)
        count += 1
    return ordered[:count], ordered[count:]


def _text_part(config: Config, source: str, tokenizer: Tokenizer, held_out: bool) -> _Part:
    held, train = _split(config, _documents(config, source))

    @cache  # once for all sites of this process
    def deal(num_shards: int) -> list[list[Document]]:
        if config.data.deal == "clusters":
            return deal_by_kind(train, num_shards, config.seed)
        return _deal(train, num_shards)

    def make_stream(shard: int, num_shards: int, name: str) -> Stream:
        own = deal(num_shards)[shard]
        if not own:
            raise DataError(f"{name} is empty: {_where_it_went(source, held, train, num_shards)}")
        tokens = _encode(own, tokenizer)
        return TokenStream(
            [tokens], seq_len=config.data.seq_len, seed=config.seed, shard=shard, name=name
        )

    digest = hashlib.sha256(b"".join(d.digest for d in held + train)).digest()
    return _Part(make_stream, _encode(held, tokenizer) if held_out else np.empty(0), digest)


def _where_it_went(
    source: str, held: list[Document], train: list[Document], num_shards: int
) -> str:
    """How a text was divided that is too small, or too uniform, for every part to get some."""
    pieces = held + train
    different = len({document.digest for document in pieces})
    what = f"{len(pieces)} documents or pieces, {different} of them different"
    if different == 1:
        what = f"{len(pieces)} identical pieces" if len(pieces) > 1 else "a single piece"
    return (
        f"data source {source} gives {what}; held out: {len(held)} (identical ones stay "
        f"together), left for {num_shards} part(s): {len(train)}"
    )


def _deal(documents: list[Document], num_shards: int) -> list[list[Document]]:
    """Give each document to the shard with the least text so far; of equal ones, to the first."""
    shards: list[list[Document]] = [[] for _ in range(num_shards)]
    sizes = [(0, shard) for shard in range(num_shards)]
    for document in documents:
        size, smallest = sizes[0]
        shards[smallest].append(document)
        heapq.heapreplace(sizes, (size + len(document.text), smallest))
    return shards


def _encode(documents: list[Document], tokenizer: Tokenizer) -> np.ndarray:
    if not documents:
        return np.empty(0, dtype=np.uint16)
    return np.concatenate([encode_document(tokenizer, document.text) for document in documents])


def _shard_part(config: Config, source: str, held_out: bool) -> _Part:
    arrays = sources.open_shards(source)
    size = _SHARD_BLOCK_WINDOWS * config.data.seq_len + 1
    for array in arrays:
        _check_tokens(config, array[:1_000_000], source)
    blocks = [array[i : i + size] for array in arrays for i in range(0, len(array), size)]
    order = np.random.Generator(np.random.PCG64([config.seed, 0x5EED])).permutation(len(blocks))
    num_held = math.ceil(config.data.held_out_fraction * len(blocks)) if held_out else 0
    held = [blocks[i] for i in order[:num_held]]
    train = [blocks[i] for i in order[num_held:]]

    def make_stream(shard: int, num_shards: int, name: str) -> Stream:
        return TokenStream(
            train[shard::num_shards],
            seq_len=config.data.seq_len,
            seed=config.seed,
            shard=shard,
            name=name,
        )

    digest = hashlib.sha256(b"".join(sources.shard_digest(array) for array in arrays)).digest()
    return _Part(make_stream, np.concatenate(held) if held else np.empty(0), digest)


def _hub_part(config: Config, source: str, tokenizer: Tokenizer, held_out: bool) -> _Part:
    """The first documents of a streamed data set are held out, as many as evaluation reads."""
    data = config.data
    dataset = sources.open_hub(source, data.hub_split)
    wanted = data.held_out_sequences * (data.seq_len + 1)
    held: list[np.ndarray] = []
    for row in sources.hub_rows(dataset, source) if held_out else ():
        if sum(map(len, held)) >= wanted:
            break
        held.append(encode_document(tokenizer, hub_text(row, data.text_field)))
    rest = dataset.skip(len(held))

    def make_stream(shard: int, num_shards: int, name: str) -> Stream:
        return HubStream(
            rest,
            tokenizer,
            source=source,
            field=data.text_field,
            seq_len=data.seq_len,
            shard=shard,
            num_shards=num_shards,
        )

    tokens = np.concatenate(held) if held else np.empty(0)
    digest = hashlib.sha256(source.encode() + tokens.astype(np.int64).tobytes()).digest()
    return _Part(make_stream, tokens, digest)


# --------------------------------------------------------------------------------------- held out


def _whole(config: Config, source: str, tokenizer: Tokenizer | None) -> np.ndarray:
    """All tokens of the held-out source, or as many as evaluation reads of a streamed one."""
    if sources.is_shards(source):
        return np.concatenate(sources.open_shards(source))
    assert tokenizer is not None
    if sources.is_hub(source):
        return _hub_part(config, source, tokenizer, True).held_out
    return _encode(_documents(config, source), tokenizer)


def _held_out_windows(config: Config, held_out: list[np.ndarray]) -> np.ndarray:
    """Sequences spread evenly over the held-out tokens of every source."""
    seq_len = config.data.seq_len
    tokens = np.concatenate(held_out)
    available = (len(tokens) - 1) // seq_len
    if available < 1:
        raise DataError(
            f"the held-out part has {len(tokens)} tokens, but one sequence needs "
            f"data.seq_len + 1 = {seq_len + 1}"
        )
    count = min(config.data.held_out_sequences, available)
    starts = np.linspace(0, available - 1, count).round().astype(np.int64) * seq_len
    windows = np.stack([tokens[start : start + seq_len + 1] for start in starts]).astype(np.int64)
    _check_tokens(config, windows, "the held-out part")
    return windows


def _check_tokens(config: Config, tokens: np.ndarray, where: str) -> None:
    """Training checks every batch; this finds most mistakes before the first step."""
    if not tokens.size:
        return
    if int(tokens.min()) < 0:
        raise DataError(f"{where} has a negative token, {int(tokens.min())}")
    if int(tokens.max()) >= config.vocab_size:
        rule = f"does not cover token {int(tokens.max())} of {where}"
        raise ConfigError("model.vocab_size", config.vocab_size, rule)


def _fingerprints(
    config: Config, tokenizer: Tokenizer | None, parts: dict[str, _Part], windows: np.ndarray
) -> dict[str, str]:
    """Hashes that all sites compare; the split is left out if a site may lack the others' text."""
    everywhere = config.data.held_out is None or config.data.sites is None
    digests = [parts[source].digest for source in sorted(parts)] if everywhere else []
    return {
        "tokenizer": tokenizer.fingerprint if tokenizer else "none",
        "data split": hashlib.sha256(b"".join(digests)).hexdigest(),
        "held-out part": hashlib.sha256(windows.tobytes()).hexdigest(),
    }
