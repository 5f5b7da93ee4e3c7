"""A tokenizer as the files that transformers' AutoTokenizer loads without a network."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from fomoe.data.tokenizer import (
    ByteTokenizer,
    LibraryTokenizer,
    Tokenizer,
    TransformersTokenizer,
)

_END_OF_TEXT = "<|endoftext|>"


def write_tokenizer(tokenizer: Tokenizer, folder: Path, *, seq_len: int) -> None:
    """Write `tokenizer.json` and `tokenizer_config.json`, or what transformers itself saves.

    Args:
        seq_len: tokens of a training sequence, kept as the model's greatest length.
    """
    if isinstance(tokenizer, TransformersTokenizer):
        tokenizer.inner.save_pretrained(folder)
        return
    if isinstance(tokenizer, ByteTokenizer):
        text, end = json.dumps(_byte_level(), ensure_ascii=False), _END_OF_TEXT
    else:
        assert isinstance(tokenizer, LibraryTokenizer)
        text = tokenizer.inner.to_str()
        end = "" if tokenizer.eos_id is None else tokenizer.inner.id_to_token(tokenizer.eos_id)
    settings: dict[str, Any] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        "model_max_length": seq_len,
    }
    if end:
        settings |= {"eos_token": end, "pad_token": end}
    (folder / "tokenizer.json").write_text(text, encoding="utf-8")
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=1) + "\n")


def _byte_level() -> dict[str, Any]:
    """Our byte tokenizer: token b is byte b, without merges, and 256 ends a text.

    The library writes every byte as a printable character, as GPT-2 does.
    """
    vocabulary = {letter: byte for byte, letter in enumerate(byte_letters())}
    vocabulary[_END_OF_TEXT] = 256
    level = {
        "type": "ByteLevel",
        "add_prefix_space": False,
        "trim_offsets": True,
        "use_regex": False,
    }
    end = {
        "id": 256,
        "content": _END_OF_TEXT,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": True,
    }
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [end],
        "normalizer": None,
        "pre_tokenizer": level,
        "post_processor": None,
        "decoder": level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": vocabulary,
            "merges": [],
        },
    }


def byte_letters() -> list[str]:
    """The character for each byte: itself where it prints, else one from 256 upwards (GPT-2)."""
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]
