"""Text files: read as what they are, or refused with the place and what they look like."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import socket
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from helpers_cli import fomoe, words, write_config

from fomoe.data.dataset import build_data
from fomoe.data.sources import find_files, read_documents
from fomoe.errors import DataError
from fomoe.load import load_config

TEXT = "Grüße, 世界 😀\nand so on\n" * 3


def read(path: Path | str, **options: str) -> str:
    return "".join(document.text for document in read_documents(str(path), **options))


def refusal(path: Path | str, **options: str) -> str:
    """What is said of a source, after its name."""
    with pytest.raises(DataError) as caught:
        read_documents(str(path), **options)
    message = str(caught.value)
    assert message.startswith(f"data source {path}")
    assert "\n" not in message
    return message.removeprefix(f"data source {path}")


# --------------------------------------------------------------------------------------- encodings

READ = {
    "utf-8": TEXT.encode(),
    "utf-8 with a mark": codecs.BOM_UTF8 + TEXT.encode(),
    "utf-16 little-endian": codecs.BOM_UTF16_LE + TEXT.encode("utf-16-le"),
    "utf-16 big-endian": codecs.BOM_UTF16_BE + TEXT.encode("utf-16-be"),
    "utf-32 little-endian": codecs.BOM_UTF32_LE + TEXT.encode("utf-32-le"),
    "utf-32 big-endian": codecs.BOM_UTF32_BE + TEXT.encode("utf-32-be"),
    "gzip": gzip.compress(TEXT.encode()),
    "gzip in two members": gzip.compress(TEXT[:9].encode()) + gzip.compress(TEXT[9:].encode()),
    "gzip of utf-16": gzip.compress(TEXT.encode("utf-16")),
    "newlines of other systems": TEXT.replace("\n", "\r\n").encode(),
}


@pytest.mark.parametrize("data", READ.values(), ids=READ)
def test_text_comes_back_to_the_letter(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.txt").write_bytes(data)
    assert read(tmp_path / "a.txt") == TEXT


@pytest.mark.parametrize("text", ["BZh is no archive", "PAR1 and more", "7z", "�"])
def test_text_that_only_begins_like_something_else(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text)
    assert read(tmp_path / "a.txt") == text


def zipped() -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        archive.writestr("a.txt", TEXT)
    return data.getvalue()


def array() -> bytes:
    data = io.BytesIO()
    np.save(data, np.arange(40))
    return data.getvalue()


_LATIN = ("at offset 9 (byte 0xfc)", "Latin-1 or Windows-1252", "iconv")
REFUSED: dict[str, tuple[bytes, tuple[str, ...]]] = {
    "latin-1": ("fine\nfür so".encode("latin-1").replace(b"f\xfcr", b"hier\xfcr"), _LATIN),
    "latin-1 at the end": (b"caf\xe9", ("offset 3 (byte 0xe9)", "like Latin-1")),
    "shift-jis": ("日本語の文章です".encode("shift-jis"), ("offset 0", "another encoding")),
    "utf-8, cut": ("aü".encode()[:-1], ("offset 1 (byte 0xc3)", "cut within its last character")),
    "utf-16-le without a mark": (
        "plain words".encode("utf-16-le"),
        ("NUL at offset 1:", "UTF-16LE without a byte order mark"),
    ),
    "utf-16-be without a mark": (
        "plain words".encode("utf-16-be"),
        ("NUL at offset 0:", "UTF-16BE without a byte order mark"),
    ),
    "utf-32-le without a mark": ("plain words".encode("utf-32-le"), ("at offset 1:", "UTF-32LE")),
    "utf-32-be without a mark": ("plain words".encode("utf-32-be"), ("at offset 0:", "UTF-32BE")),
    "utf-16, cut": ("words".encode("utf-16")[:-1], ("UTF-16-LE text at offset 10", "damaged or")),
    "utf-16 with a NUL": ("a\0".encode("utf-16"), ("NUL at offset 4", "damaged")),
    "a NUL": (b"one\0two", ("holds a NUL at offset 3:", "binary data")),
    "binary": (bytes(range(256)) * 4, ("binary data",)),
    "a surrogate": (b"ok \xed\xa0\x80", ("offset 3 (byte 0xed)",)),
    "gzip, cut": (gzip.compress(TEXT.encode())[:-9], ("damaged or cut gzip",)),
    "gzip, altered": (gzip.compress(TEXT.encode())[:-8] + b"\1" * 8, ("damaged or cut gzip",)),
    "gzip of latin-1": (gzip.compress(b"caf\xe9s"), ("offset 3 of the unpacked text", "Latin-1")),
    "gzip of gzip": (gzip.compress(gzip.compress(b"a")), ("a gzip file in a gzip file",)),
    "zip": (zipped(), ("is a zip archive, not text",)),
    "bzip2": (bz2.compress(TEXT.encode()), ("is a bzip2 file",)),
    "xz": (lzma.compress(TEXT.encode()), ("is an xz file",)),
    "zstd": (b"\x28\xb5\x2f\xfd\x04\x00", ("is a zstd file",)),
    "pdf": (b"%PDF-1.7\n%\xe2\xe3", ("is a PDF",)),
    "parquet": (b"PAR1\x15\x04PAR1", ("is a Parquet file",)),
    "numpy": (array(), ("is a NumPy array",)),
}


@pytest.mark.parametrize(("data", "parts"), REFUSED.values(), ids=REFUSED)
def test_what_is_not_text_is_refused_and_named(
    tmp_path: Path, data: bytes, parts: tuple[str, ...]
) -> None:
    """Also as one of many files: nothing is left out or replaced in silence."""
    path = tmp_path / "50.txt"
    path.write_bytes(data)
    message = refusal(path)
    for part in parts:
        assert part in message
    for number in range(40):
        (tmp_path / f"{number}.txt").write_text(words(9, number))
    with pytest.raises(DataError, match=r"^data source .*/50\.txt "):
        read_documents(f"{tmp_path}/*.txt")


# -------------------------------------------------------------------------------------- JSON Lines


def test_json_lines_are_documents(tmp_path: Path) -> None:
    """Only a newline ends a line, and what is in the field comes back as it is."""
    texts = [f"one\u2028{number}\r\ntwo 'quoted' \\ \x85" for number in range(40)]
    rows = [json.dumps({"id": i, "text": text}) for i, text in enumerate(texts)]
    lines = "\n".join([*rows[:7], "", *rows[7:]])
    (tmp_path / "a.jsonl").write_text(lines)
    (tmp_path / "windows.jsonl").write_bytes(lines.replace("\n", "\r\n").encode("utf-8-sig"))
    (tmp_path / "packed.JSONL.gz").write_bytes(gzip.compress(lines.encode()))
    (tmp_path / "raw.jsonl").write_text(json.dumps({"text": texts[0]}, ensure_ascii=False))
    for name in ("a.jsonl", "windows.jsonl", "packed.JSONL.gz"):
        assert [document.text for document in read_documents(f"{tmp_path}/{name}")] == texts
    assert read(tmp_path / "raw.jsonl") == texts[0]


def test_the_field_of_json_lines_is_an_option(tmp_path: Path) -> None:
    rows = [json.dumps({"body": chr(0x100 + n) * 90, "text": "not this"}) for n in range(40)]
    (tmp_path / "a.jsonl").write_text("\n".join(rows))
    overrides = [f"data.source={tmp_path}/a.jsonl", "data.text_field=body"]
    data = build_data(load_config(write_config(tmp_path), overrides), range(3))
    assert {t for row in data.held_out for t in row.tolist()} < {256, *range(0x80, 0xE0)}


ROWS = [
    ('{"text": "fine"}\n{"text": broken}\n', ", line 2: is not JSON"),
    ('{"text": "fine"}\n{"text": "cut', ", line 2: is not JSON"),
    ("plain words\n", ", line 1: is not JSON"),
    ('["text"]\n', ", line 1: is not a JSON object"),
    (
        '\n\n{"body": "x", "id": 3}\n',
        ", line 3: has no field text",
        "its fields are ['body', 'id']",
    ),
    ('{"text": null}\n', ", line 1: field text (data.text_field) is null, not text"),
    ('{"text": ["a"]}\n', """line 1: field text (data.text_field) is ["a"], not text"""),
    ('{"text": "a\\u0000b"}\n', ", line 1: field text holds a NUL"),
    ('{"text": "a\\ud800"}\n', ", line 1: field text holds half of a surrogate pair"),
    ('{"text": "   "}\n\n', "holds no text: it has white space only"),
    ("", "holds no text: it is empty"),
    ("[" * 100_000, ", line 1: is not JSON"),
]


@pytest.mark.parametrize(("rows", "parts"), [(row[0], row[1:]) for row in ROWS])
def test_a_line_without_text_is_refused_with_its_number(
    tmp_path: Path, rows: str, parts: tuple[str, ...]
) -> None:
    (tmp_path / "a.jsonl").write_text(rows)
    message = refusal(tmp_path / "a.jsonl")
    assert all(part in message for part in parts)


@pytest.mark.parametrize("name", ["a.csv", "A.TSV", "a.json", "a.parquet", "a.csv.gz"])
def test_records_are_refused_by_name(tmp_path: Path, name: str) -> None:
    (tmp_path / name).write_text("id,text\n1,fine\n")
    assert "holds records, not text: write the texts as JSON Lines" in refusal(tmp_path / name)


# ------------------------------------------------------------------------------------------- names

NAMES = [
    "a b [1] ünï.txt",
    "p #2.txt",
    "*.txt",
    "@f.txt",
    "[a].txt",
    "?",
    "a: b",
    "!x",
    "&y",
    "100",
]


@pytest.mark.parametrize("name", [*NAMES, "{a}", "2026-01-02", "null", "true", "1e3", " a ", "~"])
def test_a_file_that_is_there_is_taken_by_its_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    """On the command line too, where a text is taken word by word."""
    config = write_config(tmp_path)
    monkeypatch.chdir(tmp_path)
    for other in ("a.txt", "p", "b"):
        (tmp_path / other).write_text("not this one")
    (tmp_path / name).write_text(TEXT)
    source = load_config(config, [f"data.source={name}"]).data.source
    assert source == name
    assert read(source) == TEXT


def test_a_name_that_is_no_utf8(tmp_path: Path) -> None:
    """A file may have one, and is read or named in the error; the run's folder may not."""
    name, config = os.fsdecode(b"caf\xe9.txt"), write_config(tmp_path)
    (tmp_path / name).write_text(TEXT)
    assert read(tmp_path / name) == read(f"{tmp_path}/caf*") == TEXT
    (tmp_path / name).write_bytes(b"\xff")
    shown = r"caf\udce9.txt"
    for source in (name, "caf?.txt"):
        outcome = fomoe("train", config, f"data.source={tmp_path}/{source}")
        assert f"data source {tmp_path}/{shown} is not UTF-8 text" in outcome.err
    outcome = fomoe("train", config, f"run.dir={tmp_path}/{name}")
    assert f"run.dir {tmp_path}/{shown} must be UTF-8" in outcome.err


def test_patterns_are_patterns_where_no_file_has_that_name(tmp_path: Path) -> None:
    for name in ("a.txt", "b.txt", "c.md"):
        (tmp_path / name).write_text(name)
    (tmp_path / "d.txt").mkdir()
    assert read(f"{tmp_path}/*.txt") == "a.txtb.txt"
    assert read(f"{tmp_path}/[b-c].*") == "b.txtc.md"


def test_a_file_counts_once_however_many_links_lead_to_it(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").symlink_to("a.txt")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert read(f"{tmp_path}/**/*.txt") == TEXT


def test_home_is_the_readers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sites have homes of their own, so an equal config keeps the `~` of its sources."""
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.txt").write_text(words(9000, 0))
    config = write_config(tmp_path)
    outcome = fomoe("train", config, "data.source=~/a.txt", "run.dir=~/r", "rounds=1", "--json")
    assert outcome.status == 0, outcome.err
    assert outcome.json["run_dir"] == str(tmp_path / "r")
    assert load_config(tmp_path / "r" / "config.yaml").data.source == "~/a.txt"
    assert not (tmp_path / "~").exists()
    outcome = fomoe("train", config, "run.dir=~nobody-of-that-name/r")
    assert "run.dir ~nobody-of-that-name/r names a home that is not known" in outcome.err


# ------------------------------------------------------------------------------------ kinds of path


def link_to_nothing(path: Path) -> None:
    path.symlink_to("nowhere")


def link_to_itself(path: Path) -> None:
    path.symlink_to(path.name)


def link_to_zeros(path: Path) -> None:
    path.symlink_to("/dev/zero")


def listening(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(str(path))


def closed(path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("a superuser may read everything")
    path.write_text(TEXT)
    path.chmod(0)


def nothing(path: Path) -> None:
    pass


KINDS: list[tuple[Callable[[Path], object], str]] = [
    (nothing, "does not exist"),
    (link_to_nothing, "is a link to nowhere, which does not exist"),
    (link_to_itself, "is a link that leads back to itself"),
    (link_to_zeros, "is a device, not a file"),
    (listening, "is a socket, not a file"),
    (closed, "cannot be read: Permission denied"),
]
SOURCES = [
    *KINDS,
    (os.mkfifo, "is a pipe, not a file"),
    (Path.mkdir, "is a folder; name its files"),
]


def short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A name without folders: the address of a socket may have about a hundred letters."""
    monkeypatch.chdir(tmp_path)
    return Path("it")


@pytest.mark.parametrize(("make", "message"), SOURCES, ids=[m for _, m in SOURCES])
def test_a_source_that_is_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
) -> None:
    path = short(tmp_path, monkeypatch)
    make(path)
    assert refusal(path).startswith(f" {message}")


@pytest.mark.parametrize(("make", "message"), KINDS[1:], ids=[m for _, m in KINDS[1:]])
def test_a_pattern_leaves_out_folders_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
) -> None:
    path = short(tmp_path, monkeypatch)
    make(path)
    Path("is.txt").write_text(TEXT)
    with pytest.raises(DataError, match=f"^data source it {message}"):
        read_documents("i*")


def test_a_path_below_a_file_and_patterns_without_files(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "folder").mkdir()
    below = f" does not exist: {tmp_path}/a.txt is a file, not a folder"
    assert refusal(tmp_path / "a.txt" / "b" / "c") == below
    assert refusal(f"{tmp_path}/*.md") == " does not exist, and as a pattern it matches nothing"
    assert refusal(f"{tmp_path}/f*").startswith(" matches folders only")
    assert "File name too long" in refusal(f"{tmp_path}/{'x' * 300}")


@pytest.mark.parametrize(("make", "message"), KINDS, ids=[m for _, m in KINDS])
def test_the_same_of_a_config_and_of_a_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], object], message: str
) -> None:
    config, path = write_config(tmp_path), short(tmp_path, monkeypatch).with_suffix(".json")
    make(path)
    assert f"config {path} {message}" in fomoe("train", path).err
    given = [f"data.tokenizer={path}", "model.vocab_size=300", "--dry-run"]
    outcome = fomoe("train", config, *given)
    assert outcome.status == 1
    assert f"data.tokenizer {path} cannot be loaded: it {message}" in outcome.err


def test_a_config_may_come_from_a_pipe(tmp_path: Path) -> None:
    """As a shell's `<(sed ... config.yaml)` gives it."""
    text = write_config(tmp_path).read_text()
    reader, writer = os.pipe()
    os.write(writer, text.encode())
    os.close(writer)
    assert load_config(f"/dev/fd/{reader}").num_sites == 3
    os.close(reader)


def test_a_source_names_files_of_a_package() -> None:
    names = {path.name for path in find_files("package:fomoe/data/*.py")}
    assert {"sources.py", "dataset.py"} <= names


@pytest.mark.parametrize(
    "source", ["package:fomoe", "package:no_such_package/*.py", "package:json.x/*"]
)
def test_a_source_of_no_package_is_refused(source: str) -> None:
    with pytest.raises(DataError, match="names no folder of an installed package"):
        find_files(source)
