"""`fomoe generate`: sample from the merged model, exported to a temporary folder."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import torch

from fomoe.errors import DataError, ServiceError
from fomoe.exporting import export


def generate(
    run_dir: Path,
    prompt: str,
    *,
    round_idx: int | None = None,
    max_tokens: int = 100,
    temperature: float = 0.8,
    top_k: int = 0,
    seed: int = 0,
    say: Callable[[str], None] = lambda line: None,
) -> str:
    """The prompt and its continuation, by transformers' own `generate`.

    Args:
        run_dir: a run's folder, with the parts of all sites.
        prompt: may be empty: then the text begins after an end of text.
        round_idx: rounds done; None: the newest that is complete.
        max_tokens: most new tokens; an end of text may come earlier.
        temperature: 0 takes the likeliest token every time.
        top_k: draw from the k likeliest tokens; 0: from all.
        seed: of the draws, below 2^32.
        say: called with a line that says what is sampled.

    Raises:
        ServiceError: if transformers is not installed.
        FomoeError: if the model cannot be exported, or has no tokenizer.
    """
    transformers = _transformers()
    with tempfile.TemporaryDirectory(prefix="fomoe-generate-") as folder:
        out = Path(folder) / "model"
        export(run_dir, out, round_idx=round_idx, say=say)
        if not (out / "tokenizer_config.json").exists():
            raise DataError(f"{run_dir} was trained on token shards, without a tokenizer")
        model = transformers.AutoModelForCausalLM.from_pretrained(out)
        tokenizer = transformers.AutoTokenizer.from_pretrained(out)
        tokens = tokenizer(prompt, add_special_tokens=False)["input_ids"]
        if not tokens and tokenizer.eos_token_id is None:
            raise DataError("--prompt is empty, and the tokenizer has no end of text to begin with")
        inputs = torch.tensor([tokens or [tokenizer.eos_token_id]])
        transformers.set_seed(seed)
        chosen = model.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=max_tokens,
            **_drawing(temperature, top_k),
        )
        text: str = tokenizer.decode(chosen[0], skip_special_tokens=True)
    return text


def _drawing(temperature: float, top_k: int) -> dict[str, Any]:
    if temperature == 0:
        return {"do_sample": False}
    return {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": 1.0}


def _transformers() -> Any:
    # The folder is local; nothing is looked up anywhere.
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    try:
        transformers = import_module("transformers")
    except ImportError:
        raise ServiceError(
            "generate needs transformers: pip install 'fomoe[transformers]'"
        ) from None
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers
