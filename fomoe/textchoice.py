"""Which set of expert copies a token uses in the merged model, chosen by the text so far.

Every site counts the n-grams of the text that it trains on. The merged model takes the set whose
sites' text is likeliest, by naive Bayes over the n-grams from the start of the sequence up to the
token: no token looks ahead, and all layers use the same set.

Shapes: B batch, S sequence, G sets, N counters.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn.functional import pad

from fomoe.config import Config
from fomoe.copies import set_size

NUM_COUNTERS = 2**16
# Counts are smoothed by this share of the sets' mean text, and by this much per counter.
_PRIOR_SHARE, _PRIOR_COUNT = 1e-3, 0.01
_PRIME = 4_294_967_291  # below 2^32, so that a product with the multiplier fits in int64


def ngram_length(config: Config) -> int:
    """Tokens of an n-gram: the longer a token, the fewer.

    Of the lengths 1 to 4 these name the source of unseen training windows of four texts most often,
    with vocabularies of 257 (bytes), 512 to 2048, and 4096 tokens.
    """
    vocab_size = config.data.fixed_vocab_size or config.vocab_size
    return 4 if vocab_size <= 300 else 2 if vocab_size <= 2048 else 1


def ngrams(tokens_BS: Tensor, length: int) -> Tensor:
    """Counter of the n-gram that ends at each token, int64 [B, S]; -1 where none is whole."""
    hashed = torch.zeros_like(tokens_BS, dtype=torch.int64)
    for back in reversed(range(length)):
        shifted = pad(tokens_BS.long(), (back, 0))[:, : tokens_BS.shape[1]]
        hashed = (hashed * 1_000_003 + shifted + 1) % _PRIME
    hashed = (hashed * 1_000_003 % _PRIME) % NUM_COUNTERS
    hashed[:, : length - 1] = -1
    return hashed


def count_ngrams(tokens_BS: Tensor, length: int) -> Tensor:
    """Counts of the n-grams of some sequences, int64 [N]."""
    found = ngrams(tokens_BS, length)[:, length - 1 :].flatten()
    return torch.bincount(found, minlength=NUM_COUNTERS)


def choose_sets(counts_GN: Tensor, tokens_BS: Tensor, length: int) -> Tensor:
    """The likeliest set for each token, int64 [B, S]; set 0 before the first n-gram ends.

    Args:
        counts_GN: n-grams counted in each set's text.
        length: of the n-grams.
    """
    counts_GN = counts_GN.double()
    total_G1 = counts_GN.sum(1, keepdim=True).clamp_min(1)
    mean_N = (counts_GN / total_G1).mean(0) * total_G1.mean()
    smooth_GN = counts_GN + _PRIOR_SHARE * mean_N + _PRIOR_COUNT
    log_GN = (smooth_GN / smooth_GN.sum(1, keepdim=True)).log()
    found = ngrams(tokens_BS, length)
    evidence_GBS = log_GN[:, found.clamp_min(0)] * (found >= 0)
    return evidence_GBS.cumsum(-1).argmax(0)


def choosable_experts(config: Config, counts_GN: Tensor, tokens_BS: Tensor) -> Tensor:
    """The experts that each token may choose: those of its set, bool [B x S, E]."""
    set_of_E = torch.arange(config.model.num_experts) // set_size(config)
    sets_BS = choose_sets(counts_GN.cpu(), tokens_BS.cpu(), ngram_length(config))
    return (sets_BS.flatten()[:, None] == set_of_E).to(tokens_BS.device)
