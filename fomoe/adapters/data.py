"""What clients train on: text, or prompts and completions, of which only the latter are learned.

A JSON Lines file of pairs is split over the clients by a field, by Dirichlet shares of its values,
or at random. Each client holds out a part of its own; together these are the overall part.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from fomoe.adapters.base import base_fingerprint
from fomoe.config import Config
from fomoe.data import sources
from fomoe.data.dataset import Data, build_data, entropy, named_tokenizer
from fomoe.data.tokenizer import Tokenizer
from fomoe.errors import DataError

_T = TypeVar("_T")
_DEAL, _SHARES, _ORDER = 0xDEA1, 0xD112, 0x0D3E
PROMPT, COMPLETION, CHOICES = "prompt", "completion", "choices"


@dataclass(frozen=True)
class Pair:
    """A prompt, its completion, and the value of `data.client_field`.

    Attributes:
        choices: completions to choose from, the right one among them; empty: it is no question.
    """

    prompt: str
    completion: str
    group: str
    choices: tuple[str, ...] = ()

    @property
    def digest(self) -> bytes:
        return hashlib.sha256(json.dumps([self.prompt, self.completion]).encode()).digest()


class PairStream:
    """Coded windows of pairs (`inputs_and_targets`), in a new order every epoch."""

    def __init__(self, examples: list[np.ndarray], *, seed: int, client: int) -> None:
        self.examples, self.seed, self.client = examples, seed, client
        self.position = 0

    def next_batch(self, batch_size: int) -> np.ndarray:
        """The next pairs, int64 [batch_size, longest of them], padded at the end."""
        rows = []
        for _ in range(batch_size):
            epoch, index = divmod(self.position, len(self.examples))
            rows.append(self.examples[_order(self, epoch)[index]])
            self.position += 1
        return padded(rows)

    def state(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state(self, state: dict[str, int]) -> None:
        self.position = state["position"]


def _order(stream: PairStream, epoch: int) -> np.ndarray:
    numbers = [stream.seed, _ORDER, stream.client, epoch]
    return np.random.Generator(np.random.PCG64(numbers)).permutation(len(stream.examples))


def build_client_data(
    config: Config,
    sites: Iterable[int],
    *,
    tokenizer_dir: Path | None = None,
    share: Callable[[Callable[[], bytes]], bytes] = lambda make: make(),
) -> Data:
    """Streams and held-out parts of these clients, and the fingerprint of the base.

    Raises:
        DataError, ConfigError: if a source, the tokenizer, the split or the base cannot be used.
    """
    sites = tuple(sites)
    assert config.adapters.base is not None
    if config.data.format == "text":
        data = build_data(config, sites, tokenizer_dir=tokenizer_dir, share=share)
        data = replace(data, own_held_out=_own_text(config, sites))
    else:
        data = _build_pairs(config, sites)
    prints = {**data.fingerprints, "frozen base": base_fingerprint(config.adapters.base)}
    return replace(data, fingerprints=prints)


def _own_text(config: Config, sites: tuple[int, ...]) -> dict[int, np.ndarray]:
    """A client with a source of its own has a held-out part of its own."""
    data = config.data
    if data.sites is None or data.held_out is not None:
        return {}
    found = {}
    for site in sites:
        alone = data.model_copy(update={"sites": None, "source": data.sites[site]})
        found[site] = build_data(
            config.model_copy(update={"data": alone, "num_sites": 1}), (0,)
        ).held_out
    return found


def _build_pairs(config: Config, sites: tuple[int, ...]) -> Data:
    pairs = read_pairs(config.data.source, config.data.client_field)
    tokenizer = named_tokenizer(config)
    by_client = [_split(config, own) for own in deal(config, pairs)]
    encode = partial(encode_pair, tokenizer, seq_len=config.data.seq_len)
    overall, own_held = _held_out(config, [held for held, _ in by_client])
    held_out = padded([encode(pair) for pair in overall])
    targets = held_out[:, 1:][held_out[:, 1:] >= 0]
    digest = hashlib.sha256(b"".join(pair.digest for pair in pairs))
    return Data(
        streams={
            site: PairStream(
                [encode(pair) for pair in by_client[site][1]], seed=config.seed, client=site
            )
            for site in sites
        },
        held_out=held_out,
        own_held_out={site: padded([encode(pair) for pair in own_held[site]]) for site in sites},
        unigram_entropy=entropy(np.bincount(targets)),
        fingerprints={
            "tokenizer": tokenizer.fingerprint,
            "data split": digest.hexdigest(),
            "held-out part": hashlib.sha256(held_out.tobytes()).hexdigest(),
        },
        tokenizer_json=None,
    )


def held_out_pairs(config: Config) -> tuple[list[Pair], list[list[Pair]]]:
    """The overall held-out part of a run, and that of every client, as pairs.

    Raises:
        DataError: as `build_client_data`.
    """
    pairs = read_pairs(config.data.source, config.data.client_field)
    return _held_out(config, [_split(config, own)[0] for own in deal(config, pairs)])


def _held_out(config: Config, held: list[list[Pair]]) -> tuple[list[Pair], list[list[Pair]]]:
    most = config.data.held_out_sequences
    own_held = [_spread(own, most) for own in held]
    return _spread([pair for own in own_held for pair in own], most), own_held


def read_pairs(source: str, client_field: str | None) -> list[Pair]:
    """The pairs of JSON Lines files, each once, in the files' order.

    Raises:
        DataError: naming the file, the line and what is wrong.
    """
    found: dict[bytes, Pair] = {}
    for path in sources.find_files(source):
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError:
                row = None
            problem = _wrong(row, client_field)
            if problem:
                raise DataError(f"{path}, line {number}: {problem}")
            group = "" if client_field is None else str(row[client_field])
            choices = tuple(row.get(CHOICES) or ())
            pair = Pair(row[PROMPT], row[COMPLETION], group, choices)
            found.setdefault(pair.digest, pair)
    return list(found.values())


def _wrong(row: object, client_field: str | None) -> str:
    if not isinstance(row, dict):
        return "is no JSON object"
    for name in (PROMPT, COMPLETION):
        if not isinstance(row.get(name), str):
            return f"has no text in its field {name}"
    if not row[COMPLETION]:
        return f"has an empty {COMPLETION}"
    if client_field is not None and not isinstance(row.get(client_field), str | int):
        return f"has no text or number in its field {client_field} (data.client_field)"
    return "" if row.get(CHOICES) is None else _wrong_choices(row[CHOICES], row[COMPLETION])


def _wrong_choices(choices: object, completion: str) -> str:
    if not isinstance(choices, list) or not all(isinstance(x, str) and x for x in choices):
        return f"has no list of texts in its field {CHOICES}"
    if len(set(choices)) < max(2, len(choices)):
        return f"must have two {CHOICES} or more, all different"
    if completion not in choices:
        return f"has a {COMPLETION} that is none of its {CHOICES}"
    return ""


def deal(config: Config, pairs: list[Pair]) -> list[list[Pair]]:
    """The pairs of every client.

    By `data.client_field`: its values in order, value i to client i mod K. With
    `data.dirichlet_alpha`, every value is shared out: its shares over the clients are one draw
    from a symmetric Dirichlet distribution. Without a field the pairs are dealt at random.

    Raises:
        DataError: if a client gets fewer than two, one to train on and one to hold out.
    """
    data, num_clients = config.data, config.num_sites
    clients: list[list[Pair]] = [[] for _ in range(num_clients)]
    groups: dict[str, list[Pair]] = {}
    for pair in sorted(pairs, key=lambda pair: pair.digest):
        groups.setdefault(pair.group, []).append(pair)
    for index, name in enumerate(sorted(groups)):
        own = groups[name]
        draw = np.random.Generator(np.random.PCG64([config.seed, _SHARES, index]))
        if data.dirichlet_alpha is not None:
            shares = draw.dirichlet(np.full(num_clients, data.dirichlet_alpha))
            ends = (np.cumsum(shares) * len(own)).round().astype(int)
            for client, (start, stop) in enumerate(zip((0, *ends), ends, strict=False)):
                clients[client] += own[start:stop]
        elif data.client_field is not None:
            clients[index % num_clients] += own
        else:
            for position, pair in enumerate(own):
                clients[position % num_clients].append(pair)
    for client, own in enumerate(clients):
        if len(own) < 2:
            raise DataError(
                f"client {client} gets {len(own)} of the {len(pairs)} pairs of {data.source}, but "
                f"needs one to train on and one to hold out"
            )
    return clients


def _split(config: Config, own: list[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Held out and training, by the hash of seed and content."""
    key = str(config.seed).encode()
    ordered = sorted(own, key=lambda pair: hashlib.sha256(key + pair.digest).digest())
    count = max(1, min(len(own) - 1, round(config.data.held_out_fraction * len(own))))
    return ordered[:count], ordered[count:]


def encode_pair(tokenizer: Tokenizer, pair: Pair, *, seq_len: int) -> np.ndarray:
    """Tokens of a pair and its end, int64, at most seq_len + 1; those of the prompt are coded.

    A pair that is too long loses the start of its prompt; a completion that alone is too long
    loses its end.
    """
    prompt = tokenizer.encode(pair.prompt).astype(np.int64)
    completion = tokenizer.encode(pair.completion).astype(np.int64)
    if tokenizer.eos_id is not None:
        completion = np.append(completion, tokenizer.eos_id)
    completion = completion[:seq_len]
    room = seq_len + 1 - len(completion)
    prompt = prompt[max(0, len(prompt) - room) :]
    if not len(prompt):  # the first token of a window is never a target
        prompt = np.zeros(1, dtype=np.int64)
    return np.concatenate([-1 - prompt, completion])


def padded(rows: list[np.ndarray]) -> np.ndarray:
    """Rows of different lengths as one array, int64; the padding is coded as not learned."""
    out = np.full((len(rows), max(map(len, rows))), -1, dtype=np.int64)
    for place, row in zip(out, rows, strict=True):
        place[: len(row)] = row
    return out


def _spread(rows: list[_T], most: int) -> list[_T]:
    """At most so many of the rows, spread evenly."""
    count = min(most, len(rows))
    return [rows[i] for i in np.linspace(0, len(rows) - 1, count).round().astype(int)]
