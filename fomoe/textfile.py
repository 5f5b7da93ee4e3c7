"""Text files: decoded correctly, or refused with the offset of the fault and a likely cause.

UTF-8, UTF-16 and UTF-32 with a byte order mark, and gzip of these are read. Damaged bytes are never
replaced: a run trains on exactly the text of the file.
"""

from __future__ import annotations

import codecs
import errno
import gzip
import os
import stat
import zlib
from pathlib import Path

# UTF-32's little-endian mark begins with UTF-16's.
_MARKS = (
    (codecs.BOM_UTF8, "utf-8"),
    (codecs.BOM_UTF32_LE, "utf-32-le"),
    (codecs.BOM_UTF32_BE, "utf-32-be"),
    (codecs.BOM_UTF16_LE, "utf-16-le"),
    (codecs.BOM_UTF16_BE, "utf-16-be"),
)
_GZIP = b"\x1f\x8b"
_KINDS = {
    b"PK\x03\x04": "a zip archive",
    b"BZh": "a bzip2 file",
    b"\xfd7zXZ\x00": "an xz file",
    b"\x28\xb5\x2f\xfd": "a zstd file",
    b"\x04\x22\x4d\x18": "an lz4 file",
    b"7z\xbc\xaf\x27\x1c": "a 7z archive",
    b"%PDF-": "a PDF",
    b"PAR1": "a Parquet file",
    b"ARROW1": "an Arrow file",
    b"\x93NUMPY": "a NumPy array",
    b"SQLite format 3\x00": "an SQLite database",
    b"\x7fELF": "a program",
    b"\x89PNG": "an image",
    b"\xff\xd8\xff": "an image",
}
# Signatures that plain text may begin with too: they count only if more of the file agrees.
_AGREES = {
    b"BZh": lambda data: data[4:10] == b"1AY&SY",
    b"PAR1": lambda data: data.endswith(b"PAR1"),
}
_CONVERT = "; convert it (iconv -f {} -t UTF-8)"
_SAMPLE = 65_536  # bytes from which the kind of a file is guessed


class TextError(ValueError):
    """Why a file cannot be read as text; the message continues a sentence about the file."""


def why_no_file(path: str | Path, *, pipes: bool = False) -> str:
    """Why a path is not a readable file; empty if it is.

    Args:
        pipes: whether a pipe is accepted, although it can be read only once.
    """
    try:
        mode = os.stat(path).st_mode
    except ValueError:
        return "holds a NUL, which no name of a file can"
    except OSError as error:
        return _why_not_there(path, error)
    kinds = {
        stat.S_ISDIR: "is a folder",
        stat.S_ISCHR: "is a device, not a file",
        stat.S_ISBLK: "is a device, not a file",
        stat.S_ISSOCK: "is a socket, not a file",
    }
    if not pipes:
        kinds[stat.S_ISFIFO] = "is a pipe, not a file"
    for is_kind, what in kinds.items():
        if is_kind(mode):
            return what
    return "" if os.access(path, os.R_OK) else "cannot be read: Permission denied"


def _why_not_there(path: str | Path, error: OSError) -> str:
    if error.errno == errno.ELOOP:
        return "is a link that leads back to itself"
    if error.errno == errno.ENOENT:
        if os.path.islink(path):
            return f"is a link to {os.readlink(path)}, which does not exist"
        return "does not exist"
    if error.errno == errno.ENOTDIR:
        above = next(parent for parent in Path(path).parents if parent.exists())
        return f"does not exist: {above} is a file, not a folder"
    return f"cannot be reached: {error.strerror}"


def read_text(path: str | Path, *, pipes: bool = False, keep_newlines: bool = False) -> str:
    r"""The text of a file; `\r\n` and `\r` become `\n` unless `keep_newlines`.

    Raises:
        TextError: if it is not a readable file, or not text in one of the encodings.
    """
    if problem := why_no_file(path, pipes=pipes):
        raise TextError(problem)
    try:
        data = Path(path).read_bytes()
    except OSError as error:
        raise TextError(f"cannot be read: {error.strerror}") from None
    text = decode(data)
    return text if keep_newlines else text.replace("\r\n", "\n").replace("\r", "\n")


def decode(data: bytes) -> str:
    """Decode bytes to text.

    Raises:
        TextError: naming the offset of what is not text, and what the bytes look like.
    """
    where = ""
    if data.startswith(_GZIP):
        data, where = _unpack(data), " of the unpacked text"
    if kind := _kind(data):
        raise TextError(f"is {kind}, not text: unpack or convert it first")
    mark, encoding = next(
        ((mark, name) for mark, name in _MARKS if data.startswith(mark)), (b"", "utf-8")
    )
    body = data[len(mark) :]
    try:
        text = body.decode(encoding)
    except UnicodeDecodeError as error:
        offset = len(mark) + error.start
        looks = _looks(body, error) if encoding == "utf-8" else "it looks damaged or cut"
        raise TextError(
            f"is not {encoding.upper()} text at offset {offset}{where} (byte "
            f"0x{body[error.start]:02x}): {looks}"
        ) from None
    if "\0" in text:
        offset = len(mark) + len(text[: text.index("\0")].encode(encoding))
        looks = _looks_with_nuls(body) if encoding == "utf-8" else "it looks damaged"
        raise TextError(f"holds a NUL at offset {offset}{where}: {looks}")
    return text


def _unpack(data: bytes) -> bytes:
    try:
        return gzip.decompress(data)
    except (OSError, EOFError, zlib.error) as error:
        raise TextError(f"is a damaged or cut gzip file: {error}") from None


def _kind(data: bytes) -> str:
    """The kind of a file that is not text, by its first bytes; empty if none is known."""
    for start, kind in _KINDS.items():
        if data.startswith(start) and _AGREES.get(start, lambda _: True)(data):
            return kind
    return "a gzip file in a gzip file" if data.startswith(_GZIP) else ""


def _looks(body: bytes, error: UnicodeDecodeError) -> str:
    """What bytes that are not UTF-8 look like."""
    if error.reason == "unexpected end of data":
        return "it looks cut within its last character, or like Latin-1"
    sample = body[:_SAMPLE]
    if any(byte < 32 and byte not in b"\t\n\v\f\r\b\x1b" for byte in sample):
        return _looks_with_nuls(body) if 0 in sample else "it looks like binary data"
    near = body[max(0, error.start - _SAMPLE // 2) : error.start + _SAMPLE // 2]
    if sum(byte >= 128 for byte in near) > 0.4 * len(near):
        return "it looks like text in another encoding; convert it to UTF-8"
    return "it looks like Latin-1 or Windows-1252" + _CONVERT.format("WINDOWS-1252")


def _looks_with_nuls(body: bytes) -> str:
    """What bytes with NULs look like: wide encodings have one at every second byte or so."""
    sample = body[: _SAMPLE - _SAMPLE % 4]
    shares = [sample[i::4].count(0) / max(len(sample[i::4]), 1) for i in range(4)]
    for encoding, text_at in (("UTF-32LE", 0), ("UTF-32BE", 3)):
        if all((share < 0.5) == (i == text_at) for i, share in enumerate(shares)):
            return _without_mark(encoding)
    for encoding, text_at in (("UTF-16LE", 0), ("UTF-16BE", 1)):
        if all((share < 0.5) == (i % 2 == text_at) for i, share in enumerate(shares)):
            return _without_mark(encoding)
    return "it looks like binary data"


def _without_mark(encoding: str) -> str:
    return f"it looks like {encoding} without a byte order mark{_CONVERT.format(encoding)}"
