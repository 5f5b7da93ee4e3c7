"""Documents dealt by kind: every one once, parts of equal length, like to like, on any machine."""

from __future__ import annotations

import hashlib
import random
from pathlib import Path

import numpy as np
import pytest
from helpers_cli import write_config

from fomoe.data import clusters
from fomoe.data.clusters import deal_by_kind
from fomoe.data.dataset import build_data
from fomoe.data.sources import Document
from fomoe.errors import ConfigError
from fomoe.load import load_config

WORDS = (
    ["the", "king", "speaks", "of", "love", "and", "of", "war", "to", "his", "queen"],
    ["return", "self", "value", "import", "yield", "lambda", "def", "class"],
    ["rainfall", "farmers", "harvest", "sheep", "cattle", "market", "price"],
    ["0", "1", "1", "2", "3", "5", "8", "13", "21", "34", "55", "89"],
)


def kinds(count: int, seed: int = 0) -> tuple[list[Document], list[int]]:
    """Texts of four kinds in a mixed order, and the kind of each; kinds have equally many."""
    draw = random.Random(seed)
    of = [number % 4 for number in range(count)]
    draw.shuffle(of)
    texts = [" ".join(draw.choices(WORDS[kind], k=160)) for kind in of]
    return [Document(text[:240]) for text in texts], of


def test_documents_of_a_kind_are_together() -> None:
    documents, of = kinds(80)
    kind_of = {document.text: kind for document, kind in zip(documents, of, strict=True)}
    found = []
    for part in deal_by_kind(documents, 4, seed=0):
        members = [kind_of[document.text] for document in part]
        found.append(max(map(members.count, range(4))) / len(members))
    assert min(found) > 0.8


@pytest.mark.parametrize("num_parts", [1, 2, 3, 7, 80, 100])
def test_every_document_is_dealt_once_in_its_order(num_parts: int) -> None:
    documents, _ = kinds(80)
    place = {document.text: number for number, document in enumerate(documents)}
    parts = deal_by_kind(documents, num_parts, seed=1)
    assert len(parts) == num_parts
    numbers = [[place[document.text] for document in part] for part in parts]
    assert sorted(number for part in numbers for number in part) == list(range(80))
    assert all(part == sorted(part) for part in numbers)


def test_parts_are_equally_long_within_a_document() -> None:
    draw = random.Random(3)
    documents = [
        Document(
            " ".join(draw.choices(WORDS[0] if number < 60 else WORDS[1], k=draw.randint(1, 99)))
        )
        for number in range(70)
    ]
    longest = max(len(document.text) for document in documents)
    share = sum(len(document.text) for document in documents) / 4
    for part in deal_by_kind(documents, 4, seed=0):
        assert sum(len(document.text) for document in part) < share + longest


def test_the_order_of_sums_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Distances in blocks of other sizes are the same integers, not only close to them."""
    documents, _ = kinds(60)
    vectors_NV = np.stack([clusters._vector(document.text) for document in documents])
    means_KV = vectors_NV[:5].astype(np.float64)
    exact = [
        [
            sum((int(m) - int(v)) ** 2 for m, v in zip(mean, vector, strict=True))
            for mean in means_KV
        ]
        for vector in vectors_NV
    ]
    squares_N = (vectors_NV.astype(np.int64) ** 2).sum(1)
    whole = clusters._distances(vectors_NV, means_KV)
    monkeypatch.setattr(clusters, "_BLOCK", 7)
    assert (clusters._distances(vectors_NV, means_KV) == whole).all()
    assert (whole + squares_N[:, None]).tolist() == exact


def test_the_parts_are_those_of_every_machine() -> None:
    """Fixed by hand from one machine: another that deals otherwise would train on other text."""
    documents, _ = kinds(80)
    parts = deal_by_kind(documents, 4, seed=0)
    texts = "|".join(" ".join(document.digest.hex()[:6] for document in part) for part in parts)
    assert hashlib.sha256(texts.encode()).hexdigest()[:12] == "d56d7f72fd47"


def test_a_short_or_strange_text_has_a_vector() -> None:
    for text in ("", "a", "\0\0\0\0", "日本"):
        vector = clusters._vector(text).astype(np.int64)
        assert abs(int((vector**2).sum()) - 4096**2) < 2 * 4096 * 64


def test_sites_read_their_own_parts_of_a_text(tmp_path: Path) -> None:
    """As many processes as sites see what one process sees, and every document at one site."""
    documents, _ = kinds(48)
    (tmp_path / "texts").mkdir()
    for number, document in enumerate(documents):
        (tmp_path / "texts" / f"{number:02d}.txt").write_text(document.text)
    source = [f"data.source={tmp_path}/texts/*.txt", "data.seq_len=16", "data.tokenizer=byte"]
    path = write_config(tmp_path)
    both = [load_config(path, [*source, f"data.deal={how}"]) for how in ("clusters", "random")]
    sites = range(both[0].num_sites)
    together = build_data(both[0], sites)
    windows = {site: together.streams[site].next_batch(20) for site in sites}
    for site in sites:
        alone = build_data(both[0], [site])
        assert (alone.streams[site].next_batch(20) == windows[site]).all()
        assert alone.fingerprints == together.fingerprints
    other = build_data(both[1], sites)
    assert (other.held_out == together.held_out).all()
    assert any((other.streams[site].next_batch(20) != windows[site]).any() for site in sites)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["data.sites=[a.txt,b.txt]", "num_sites=2"], "must be random with data.sites"),
        (["data.source=hf:some/set"], "must be random with a streamed data set"),
        (
            ["data.source=a.bin", "data.tokenizer=none", "model.vocab_size=99"],
            "must be random with a streamed data set",
        ),
    ],
)
def test_what_cannot_be_dealt_by_kind_is_refused(
    overrides: list[str], said: str, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"data\.deal clusters") as caught:
        load_config(write_config(tmp_path), [*overrides, "data.deal=clusters"])
    assert said in str(caught.value)
