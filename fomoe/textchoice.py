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

NUM_COUNTERS = 2**16
NGRAM = 4
# Counts are smoothed by this share of the sets' mean text, and by this much per counter.
_PRIOR_SHARE, _PRIOR_COUNT = 1e-3, 0.01
_PRIME = 4_294_967_291  # below 2^32, so that a product with the multiplier fits in int64


def ngrams(tokens_BS: Tensor) -> Tensor:
    """Counter of the n-gram that ends at each token, int64 [B, S]; -1 where none is whole."""
    hashed = torch.zeros_like(tokens_BS, dtype=torch.int64)
    for back in reversed(range(NGRAM)):
        shifted = pad(tokens_BS.long(), (back, 0))[:, : tokens_BS.shape[1]]
        hashed = (hashed * 1_000_003 + shifted + 1) % _PRIME
    hashed = (hashed * 1_000_003 % _PRIME) % NUM_COUNTERS
    hashed[:, : NGRAM - 1] = -1
    return hashed


def count_ngrams(tokens_BS: Tensor) -> Tensor:
    """Counts of the n-grams of some sequences, int64 [N]."""
    found = ngrams(tokens_BS)[:, NGRAM - 1 :].flatten()
    return torch.bincount(found, minlength=NUM_COUNTERS)


def choose_sets(counts_GN: Tensor, tokens_BS: Tensor) -> Tensor:
    """The likeliest set for each token, int64 [B, S]; set 0 before the first n-gram ends.

    Args:
        counts_GN: n-grams counted in each set's text.
    """
    counts_GN = counts_GN.double()
    total_G1 = counts_GN.sum(1, keepdim=True).clamp_min(1)
    mean_N = (counts_GN / total_G1).mean(0) * total_G1.mean()
    smooth_GN = counts_GN + _PRIOR_SHARE * mean_N + _PRIOR_COUNT
    log_GN = (smooth_GN / smooth_GN.sum(1, keepdim=True)).log()
    found = ngrams(tokens_BS)
    evidence_GBS = log_GN[:, found.clamp_min(0)] * (found >= 0)
    return evidence_GBS.cumsum(-1).argmax(0)


def choose_experts(counts_GN: Tensor, tokens_BS: Tensor, num_experts: int) -> Tensor:
    """The experts that each token may choose: those of its set, bool [B x S, E], E / G per set."""
    set_of_E = torch.arange(num_experts) // (num_experts // len(counts_GN))
    sets_T = choose_sets(counts_GN.cpu(), tokens_BS.cpu()).flatten()
    return (sets_T[:, None] == set_of_E).to(tokens_BS.device)
