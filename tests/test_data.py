"""Sources, tokenizers, the split, and streams that continue exactly where they stood."""

from __future__ import annotations

import inspect
import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from helpers_cli import WORDS, words, write_config, write_texts

from fomoe.config import METHODS
from fomoe.data.dataset import Data, build_data
from fomoe.data.sources import open_shards, read_documents
from fomoe.data.stream import HubStream, Stream, TokenStream
from fomoe.data.tokenizer import ByteTokenizer, load_tokenizer, parse_bpe, train_bpe
from fomoe.errors import ConfigError, DataError
from fomoe.load import load_config

SEQ_LEN = 16
SHARDS = ("data.tokenizer=none", "model.vocab_size=20000")


def build(tmp_path: Path, *overrides: str, sites: tuple[int, ...] | None = None) -> Data:
    config = load_config(write_config(tmp_path), list(overrides))
    return build_data(config, range(config.num_sites) if sites is None else sites)


def epoch(stream: Stream) -> np.ndarray:
    """All windows of a token stream's next epoch."""
    assert isinstance(stream, TokenStream)
    return stream.next_batch(stream.num_windows)


def letters(folder: Path, count: int = 40, first: int = 0, length: int = 50) -> str:
    """Text files of one letter each, that no other file has: tokens tell the document."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        (folder / f"{number:04d}.txt").write_text(chr(0x100 + number) * length)
    return str(folder / "*.txt")


def documents_in(windows: np.ndarray) -> set[int]:
    """Which of the `letters` files some byte tokens come from."""
    found = set()
    for row in windows:
        text = bytes(token for token in row.tolist() if token < 256).decode(errors="ignore")
        found |= {ord(letter) - 0x100 for letter in text}
    return found


def write_bin(path: Path, tokens: np.ndarray, dtype: type = np.uint16) -> str:
    """llm.c's layout: 256 int32 with a magic number, the version and the count, then the tokens."""
    header = np.zeros(256, dtype="<i4")
    header[:3] = {np.uint16: 20240520, np.uint32: 20240801}[dtype], 1, len(tokens)
    path.write_bytes(header.tobytes() + tokens.astype(dtype).tobytes())
    return str(path)


# ----------------------------------------------------------------------------------------- sources


def test_the_standard_library_is_text_of_this_interpreter() -> None:
    texts = [document.text for document in read_documents("python-stdlib")]
    assert len(texts) > 200
    assert inspect.getsource(json) in texts
    assert not any("class DeprecatedTestCase" in text for text in texts)


def test_a_file_is_cut_at_line_ends_and_nothing_is_lost(tmp_path: Path) -> None:
    text = words(20_000, 0) + "x" * 40_000 + "\n" + words(100, 1)
    path = tmp_path / "long.txt"
    path.write_text(text)
    pieces = [document.text for document in read_documents(str(path))]
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= 16_384
    within_the_long_line = [piece for piece in pieces if set(piece) == {"x"}]
    at_line_ends = [piece for piece in pieces if piece.endswith("\n")]
    assert len(at_line_ends) >= len(pieces) - len(within_the_long_line) - 2
    assert len(pieces) > 5


def test_files_of_a_glob_in_a_fixed_order(tmp_path: Path) -> None:
    letters(tmp_path / "a" / "b")
    (tmp_path / "a" / "note.md").write_text("not this one")
    read = [document.text[0] for document in read_documents(str(tmp_path / "**" / "*.txt"))]
    assert read == [chr(0x100 + number) for number in range(40)]


@pytest.mark.parametrize("kind", ["uint16", "uint32", "int32"])
def test_token_shards(tmp_path: Path, kind: str) -> None:
    tokens = np.arange(9000)
    if kind == "int32":
        source = str(tmp_path / "a.npy")
        np.save(source, tokens.astype(np.int32))
    else:
        source = write_bin(tmp_path / "a.bin", tokens, getattr(np, kind))
    assert np.array_equal(np.concatenate(open_shards(source)), tokens)
    data = build(tmp_path, f"data.source={source}", *SHARDS)
    train = [set(epoch(data.streams[site])[:, :-1].ravel().tolist()) for site in range(3)]
    assert not train[0] & train[1] | train[1] & train[2] | train[0] & train[2]
    assert not set(data.held_out.ravel().tolist()) & set.union(*train)
    assert len(set.union(*train)) > 0.8 * len(tokens)


def test_ids_above_two_bytes_survive(tmp_path: Path) -> None:
    tokens = np.arange(9000) + 70_000
    source = write_bin(tmp_path / "a.bin", tokens, np.uint32)
    data = build(tmp_path, f"data.source={source}", SHARDS[0], "model.vocab_size=79000")
    batch = data.streams[0].next_batch(4)
    assert batch.dtype == np.int64
    assert batch.min() >= 70_000


def test_several_shards_by_a_glob(tmp_path: Path) -> None:
    for number in range(3):
        write_bin(tmp_path / f"part{number}.bin", np.arange(4000) + 4000 * number)
    data = build(tmp_path, f"data.source={tmp_path}/part*.bin", *SHARDS)
    seen = set()
    for site in range(3):
        rows = epoch(data.streams[site])
        assert (np.diff(rows) == 1).all()  # no window crosses from one shard to the next
        seen |= set(rows.ravel().tolist())
    assert {token // 4000 for token in seen} == {0, 1, 2}


def write_hub(folder: Path, count: int = 60) -> str:
    folder.mkdir()
    rows = [json.dumps({"text": chr(0x100 + number) * 30}) for number in range(count)]
    (folder / "train.jsonl").write_text("\n".join(rows) + "\n")
    return f"hf:{folder}"


def test_a_hub_data_set(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    source = write_hub(tmp_path / "hub")
    data = build(tmp_path, f"data.source={source}")
    held = documents_in(data.held_out)
    assert held == {0, 1}  # as many as 6 windows of 17 tokens need, 61 tokens each
    seen = [documents_in(data.streams[site].next_batch(60)) for site in range(3)]
    assert not seen[0] & seen[1] | seen[1] & seen[2] | seen[0] & seen[2]
    assert not held & set.union(*seen)
    assert len(set.union(*seen)) > 40


@pytest.mark.parametrize("source", ["hf:json", "hf:~/json"])
def test_a_folder_is_taken_before_what_the_library_calls_so(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str
) -> None:
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    write_hub(tmp_path / "json")
    (tmp_path / "json" / "train.jsonl").rename(tmp_path / "json" / "part.jsonl")
    (tmp_path / "another.json").write_text('{"text": "not this one"}\n' * 90)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert documents_in(build(tmp_path, f"data.source={source}").held_out) == {0, 1}


def test_a_hub_stream_resumes_exactly(tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    source = write_hub(tmp_path / "hub")
    stream = build(tmp_path, f"data.source={source}", sites=(1,)).streams[1]
    stream.next_batch(70)
    state = json.loads(json.dumps(stream.state()))
    rest = stream.next_batch(100)
    again = build(tmp_path, f"data.source={source}", sites=(1,)).streams[1]
    again.load_state(state)
    assert state["epoch"] == 0
    assert np.array_equal(again.next_batch(100), rest)
    assert stream.state()["epoch"] > 0


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ('{"text": "fine"}\n' * 40 + '{"text": broken\n', "cannot be read"),
        ('{"text": "fine"}\n' * 40 + '{"text": null}\n' * 40, "is not a text column"),
        ('{"words": "fine"}\n' * 40, "the columns are ['words']"),
        ('{"text": "fine"}\n' * 40, "one sequence needs data.seq_len + 1 = 17"),
    ],
)
def test_a_hub_data_set_that_cannot_be_used(tmp_path: Path, rows: str, message: str) -> None:
    pytest.importorskip("datasets", reason="the hub extra is not installed")
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub" / "train.jsonl").write_text(rows)

    def read() -> None:
        data = build(tmp_path, f"data.source=hf:{tmp_path}/hub", "data.held_out_sequences=11")
        data.streams[0].next_batch(40)

    with pytest.raises(DataError) as caught:
        read()
    assert message in str(caught.value)


# -------------------------------------------------------------------------------------- tokenizers


def test_bytes_come_back() -> None:
    text = "Grüße, 世界\n"
    tokens = ByteTokenizer().encode(text)
    assert bytes(tokens.tolist()).decode() == text
    assert (ByteTokenizer.vocab_size, ByteTokenizer.eos_id) == (257, 256)


def test_trained_bpe(tmp_path: Path) -> None:
    texts = [words(300, number) for number in range(5)]
    made = train_bpe(texts, 300)
    assert train_bpe(texts, 300) == made  # sites may train it apart
    tokenizer = parse_bpe(made)
    tokens = tokenizer.encode(texts[0] + "ü")
    assert tokenizer.inner.decode(tokens.tolist()) == texts[0] + "ü"  # type: ignore[attr-defined]
    assert len(tokens) < len(texts[0]) / 2
    assert tokenizer.vocab_size == 300
    assert tokenizer.eos_id == 0


@pytest.mark.parametrize("damage", [b"", b"{}", b"\xff\xfe", b'{"version": "1.0"'])
def test_a_damaged_tokenizer_of_a_run_is_refused(damage: bytes) -> None:
    with pytest.raises(DataError, match=r"^the run's tokenizer\.json is damaged: "):
        parse_bpe(damage)


def test_bpe_is_trained_on_the_training_text(tmp_path: Path) -> None:
    """Not on the held-out part, whose words would leak through the vocabulary."""
    source = letters(tmp_path / "letters", length=400)
    held = documents_in(build(tmp_path, f"data.source={source}").held_out)
    config = [f"data.source={source}", "data.tokenizer=bpe", "data.bpe_vocab_size=4000"]
    data = build(tmp_path, *config)
    vocabulary = json.loads(data.tokenizer_json or b"")["model"]["vocab"]
    tokenizer = parse_bpe(data.tokenizer_json or b"")
    lengths = {n: len(tokenizer.encode(chr(0x100 + n) * 400)) for n in range(40)}
    assert held
    assert len(vocabulary) > 300
    for number, length in lengths.items():
        assert (length > 100) == (number in held), number


def test_a_tokenizer_by_file_and_by_folder(tmp_path: Path) -> None:
    made = train_bpe([words(300, number) for number in range(5)], 280)
    (tmp_path / "tokenizer.json").write_bytes(made)
    for name in (tmp_path / "tokenizer.json", tmp_path):
        tokenizer = load_tokenizer(str(name))
        assert tokenizer.vocab_size == 280
        assert tokenizer.fingerprint == parse_bpe(made).fingerprint
        data = build(tmp_path, f"data.tokenizer={name}", "model.vocab_size=300")
        expected = tokenizer.encode("text").tolist()
        tokens = data.streams[0].blocks[0].tolist()  # type: ignore[attr-defined]
        starts = [i for i in range(len(tokens)) if tokens[i : i + len(expected)] == expected]
        assert len(starts) >= tokens.count(tokenizer.eos_id) > 5  # every document starts with it


def test_model_vocab_size_may_exceed_the_tokenizers_but_not_be_below(tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(train_bpe([words(300, 1)], 270))
    name = f"data.tokenizer={tmp_path}/tokenizer.json"
    for size in (270, 1000):
        build(tmp_path, name, f"model.vocab_size={size}")
    with pytest.raises(ConfigError, match="vocab_size 269 is below the tokenizer's 270 tokens"):
        build(tmp_path, name, "model.vocab_size=269")


# ---------------------------------------------------------------------------------------- the split


def test_held_out_is_equal_everywhere_and_disjoint_from_training(tmp_path: Path) -> None:
    source = f"data.source={letters(tmp_path / 'letters')}"
    together = build(tmp_path, source)
    train = [documents_in(epoch(together.streams[site])) for site in range(3)]
    held = documents_in(together.held_out)
    assert held
    assert not held & set.union(*train)
    assert sum(map(len, train)) == len(set.union(*train)) == 40 - 4  # a tenth is held out
    for site in range(3):
        alone = build(tmp_path, source, sites=(site,))
        assert list(alone.streams) == [site]
        assert np.array_equal(alone.held_out, together.held_out)
        assert alone.fingerprints == together.fingerprints
        assert documents_in(epoch(alone.streams[site])) == train[site]
    assert max(map(len, train)) - min(map(len, train)) <= 1


def test_equal_documents_stay_on_one_side(tmp_path: Path) -> None:
    for copy in range(4):
        letters(tmp_path / "letters" / str(copy), count=12)
    for seed in range(8):
        data = build(tmp_path, f"data.source={tmp_path}/letters/**/*.txt", f"seed={seed}")
        train = set.union(*(documents_in(epoch(data.streams[site])) for site in range(3)))
        assert not documents_in(data.held_out) & train


def test_the_split_and_the_order_depend_on_the_seed_only(tmp_path: Path) -> None:
    source = f"data.source={letters(tmp_path / 'letters')}"
    first, same = build(tmp_path, source), build(tmp_path, source, "local_steps=5")
    other = build(tmp_path, source, "seed=1")
    assert first.fingerprints == same.fingerprints
    assert np.array_equal(epoch(first.streams[1]), epoch(same.streams[1]))
    assert documents_in(first.held_out) != documents_in(other.held_out)
    differs = {
        name for name, hash_ in other.fingerprints.items() if hash_ != first.fingerprints[name]
    }
    assert differs == {"data split", "held-out part"}


def test_fingerprints_tell_another_text(tmp_path: Path) -> None:
    source = f"data.source={letters(tmp_path / 'letters')}"
    before = build(tmp_path, source).fingerprints
    path = tmp_path / "letters" / "0007.txt"
    path.write_text(path.read_text() + "!")
    assert build(tmp_path, source).fingerprints["data split"] != before["data split"]


def test_sites_with_sources_of_their_own(tmp_path: Path) -> None:
    ours = letters(tmp_path / "ours", count=40)
    theirs = letters(tmp_path / "theirs", count=40, first=100)
    data = build(tmp_path, f"data.sites=[{ours},{theirs},{ours}]")
    train = [documents_in(epoch(data.streams[site])) for site in range(3)]
    assert min(train[1]) >= 100 > max(train[0] | train[2])
    assert not train[0] & train[2]
    assert len(train[0] | train[2]) == len(train[1]) == 36
    held = documents_in(data.held_out)
    assert min(held) < 100 <= max(held)  # every source is evaluated on
    assert not held & set.union(*train)


def test_a_held_out_source_leaves_all_text_to_training(tmp_path: Path) -> None:
    ours = letters(tmp_path / "ours", count=40)
    theirs = letters(tmp_path / "theirs", count=5, first=100)
    data = build(tmp_path, f"data.source={ours}", f"data.held_out={theirs}")
    train = [documents_in(epoch(data.streams[site])) for site in range(3)]
    assert sum(map(len, train)) == len(set.union(*train)) == 40
    assert documents_in(data.held_out) == set(range(100, 105))


def test_more_shards_than_sites(tmp_path: Path) -> None:
    source = f"data.source={letters(tmp_path / 'letters')}"
    five = build(tmp_path, source, "num_sites=5")
    three = build(tmp_path, source, "data.num_shards=5")
    for site in range(3):
        assert np.array_equal(epoch(three.streams[site]), epoch(five.streams[site]))
    alone = build(tmp_path, source, "method=single").streams[0]  # has the text of site 0 of three
    assert np.array_equal(epoch(alone), epoch(build(tmp_path, source).streams[0]))


def test_sources_of_parts_that_no_site_trains_on(tmp_path: Path) -> None:
    """They count in the split: the sites have the text that they have among all."""
    ours = letters(tmp_path / "ours", count=40)
    theirs = letters(tmp_path / "theirs", count=40, first=100)
    sites = f"data.sites=[{ours},{theirs},{ours}]"
    three = build(tmp_path, sites)
    two = build(tmp_path, sites, "data.num_shards=3", "num_sites=2")
    one = build(tmp_path, sites, "method=single")
    trained = {site: epoch(stream) for site, stream in three.streams.items()}
    for fewer in (one, two):
        assert fewer.fingerprints == three.fingerprints
        for site, stream in fewer.streams.items():
            assert np.array_equal(epoch(stream), trained[site])
    assert (len(one.streams), len(two.streams)) == (1, 2)


# What decides the text: the methods of one comparison must agree on all of it.
TEXTS_OF_ALL = {
    "one source": [],
    "a source per site": ["data.sites=[A,B,C]"],
    "sites that share a source": ["data.sites=[B,A,B]"],
    "a trained tokenizer": ["data.sites=[A,B,C]", "data.tokenizer=bpe", "data.bpe_vocab_size=300"],
    "more parts than sites": ["data.num_shards=5"],
    "more sources than sites": ["data.sites=[A,B,C,A]", "data.num_shards=4"],
    "a held-out source": ["data.sites=[A,B,C]", "data.held_out=B"],
    "shards of tokens": ["data.sites=[S.npy,T.npy,S.npy]", *SHARDS],
}


@pytest.mark.parametrize("options", TEXTS_OF_ALL.values(), ids=TEXTS_OF_ALL)
def test_all_methods_of_a_comparison_have_equal_text_and_tokens(
    tmp_path: Path, options: list[str]
) -> None:
    for first, name in enumerate("ABC"):
        write_texts(tmp_path / name, first=100 * first)
        options = [o.replace(name, f"{tmp_path}/{name}/*.txt") if "=" in o else o for o in options]
    for first, name in enumerate("ST"):
        np.save(tmp_path / f"{name}.npy", np.arange(9000) + 9000 * first)
        options = [o.replace(f"{name}.npy", f"{tmp_path}/{name}.npy") for o in options]
    config = write_config(tmp_path)
    options = [*options, "placement.replication_factor=1", "model.num_experts=6"]  # fit copies
    ours = load_config(config, options, method="fomoe")
    first = build_data(ours, range(ours.num_sites))
    trained = {site: epoch(stream) for site, stream in first.streams.items()}
    for method in METHODS:
        own = load_config(config, options, method=method)
        data = build_data(own, range(own.num_sites))
        assert data.fingerprints == first.fingerprints, method
        assert np.array_equal(data.held_out, first.held_out), method
        for site, stream in data.streams.items():
            assert np.array_equal(epoch(stream), trained[site]), (method, site)


def test_held_out_sequences_and_their_entropy(tmp_path: Path) -> None:
    data = build(tmp_path)
    assert data.held_out.shape == (6, SEQ_LEN + 1)
    counts = Counter(data.held_out[:, 1:].ravel().tolist())
    total = sum(counts.values())
    expected = -sum(n / total * math.log(n / total) for n in counts.values())
    assert data.unigram_entropy == pytest.approx(expected, rel=1e-12)


def test_every_document_is_followed_by_end_of_text(tmp_path: Path) -> None:
    data = build(tmp_path, f"data.source={letters(tmp_path / 'letters')}")
    blocks = [data.streams[site].blocks[0].tolist() for site in range(3)]  # type: ignore[attr-defined]
    assert sum(block.count(256) for block in blocks) == 36
    assert all(block[-1] == 256 for block in blocks)
    assert all(block.index(256) == 100 for block in blocks)  # 50 letters of two bytes


# ----------------------------------------------------------------------------------------- streams


def counting(*lengths: int, shard: int = 0, seed: int = 0) -> TokenStream:
    """A stream over blocks of 0, 1, 2, ... and 10000, 10001, ... and so on."""
    blocks = [np.arange(n) + 10_000 * i for i, n in enumerate(lengths)]
    return TokenStream(blocks, seq_len=SEQ_LEN, seed=seed, shard=shard, name="the text")


def test_targets_are_the_inputs_shifted_by_one() -> None:
    batch = counting(500, 300).next_batch(8)
    assert batch.shape == (8, SEQ_LEN + 1)
    assert np.array_equal(batch[:, 1:], batch[:, :-1] + 1)


def test_every_window_once_per_epoch() -> None:
    stream = counting(500, 333, 10, 17)  # one is too short for a window, one is exactly a window
    orders, shifts = [], set()
    for _ in range(5):
        rows = epoch(stream)
        starts = rows[:, 0]
        assert (np.diff(rows) == 1).all()
        assert sorted(starts // 10_000) == [0] * 31 + [1] * 20 + [3]
        for block, count in ((0, 31), (1, 20)):
            own = np.sort(starts[starts // 10_000 == block]) - 10_000 * block
            assert np.array_equal(own - own[0], np.arange(count) * SEQ_LEN)
            shifts.add((block, int(own[0])))
        orders.append(starts.tolist())
    assert len({tuple(order) for order in orders}) == 5
    assert len(shifts) > 2  # the tokens at the ends get their turn
    assert orders[0] != sorted(orders[0])


def test_sites_and_seeds_have_orders_of_their_own() -> None:
    rows = [
        counting(500, shard=s, seed=seed).next_batch(20).tolist()
        for s, seed in [(0, 0), (1, 0), (0, 1)]
    ]
    assert rows[0] != rows[1] != rows[2] != rows[0]
    assert counting(500).next_batch(20).tolist() == rows[0]


@pytest.mark.parametrize("taken", [0, 1, 5, 30, 31, 32, 77])
def test_a_stream_resumes_anywhere(taken: int) -> None:
    stream = counting(500)
    if taken:
        stream.next_batch(taken)
    state = json.loads(json.dumps(stream.state()))
    rest = stream.next_batch(70)
    again = counting(500)
    again.next_batch(100)  # where it stood before does not matter
    again.load_state(state)
    assert np.array_equal(again.next_batch(70), rest)
    assert again.state() == stream.state()


def test_batches_of_any_size_give_the_same_sequences() -> None:
    one, many = counting(300), counting(300)
    rows = np.concatenate([one.next_batch(size) for size in (1, 4, 7, 30)])
    assert np.array_equal(rows, many.next_batch(42))


# ------------------------------------------------------------------------------------- hub streams


class Rows:
    """The part of a streamed data set that the stream uses."""

    def __init__(self, texts: list[str]) -> None:
        self.texts = texts

    def skip(self, count: int) -> Rows:
        return Rows(self.texts[count:])

    def __iter__(self) -> Iterator[dict[str, Any]]:
        return iter([{"text": text} for text in self.texts])


TEXTS = [(WORDS[n % 10] + " ") * (n * 7 % 11) for n in range(50)]  # some are empty


def hub_stream(shard: int, texts: list[str] = TEXTS) -> HubStream:
    return HubStream(
        Rows(texts),
        ByteTokenizer(),
        source="hf:test",
        field="text",
        seq_len=SEQ_LEN,
        shard=shard,
        num_shards=3,
    )


def hub_tokens(shard: int) -> list[int]:
    return [t for text in TEXTS[shard::3] for t in [*text.encode(), 256]]


@pytest.mark.parametrize("shard", [0, 1, 2])
def test_packing_loses_and_repeats_nothing(shard: int) -> None:
    """Only what is left at the end of an epoch and does not fill a window is left out."""
    tokens, stream = hub_tokens(shard), hub_stream(shard)
    count = (len(tokens) - 1) // SEQ_LEN
    for _ in range(3):
        rows = stream.next_batch(count)
        assert rows[:, :-1].ravel().tolist() == tokens[: count * SEQ_LEN]
        assert rows[:, 1:].ravel().tolist() == tokens[1 : count * SEQ_LEN + 1]
    assert stream.state()["epoch"] == 2


def test_a_packed_stream_resumes_at_every_window() -> None:
    stream = hub_stream(1)
    count = (len(hub_tokens(1)) - 1) // SEQ_LEN
    for _ in range(2 * count + 3):
        state = json.loads(json.dumps(stream.state()))
        window = stream.next_batch(1)
        again = hub_stream(1)
        again.next_batch(5)
        again.load_state(state)
        rest = again.next_batch(1)
        assert np.array_equal(rest, window), state
        assert again.state() == stream.state()


def test_a_hub_shard_without_a_sequence_is_refused_and_does_not_spin() -> None:
    with pytest.raises(DataError, match="shard 2 5 tokens, but one sequence needs"):
        hub_stream(2, ["", "", "four"]).next_batch(1)
