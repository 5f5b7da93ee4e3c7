"""A plan as a config that `fomoe train` accepts."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from math import ceil
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from fomoe_sim.cluster import Site
from fomoe_sim.question import OWN_RECOMPUTE, Question
from fomoe_sim.sites import Answered
from fomoe_sim.traffic import cyclic_holdings
from fomoe_sim.trainer import ConfigError, build_config, check_ranks, codec_of

RECOMPUTE = {ours: name for name, ours in OWN_RECOMPUTE.items()}


def config_tree(question: Question, known: Answered) -> dict[str, Any]:
    """Nested options of a plan that `fomoe train` runs, as a YAML experiment has them."""
    shape, attention = question.shape, question.shape.attention
    num_sites, seq_len = question.cluster.num_sites, question.inside.seq_len
    micro, accumulate = _batches(question, known)
    per_round = question.local_steps * sum(micro) * accumulate * seq_len
    tree: dict[str, Any] = {
        "method": question.method.name,
        "num_sites": num_sites,
        "local_steps": question.local_steps,
        "rounds": max(1, ceil(question.tokens / per_round)),
        "model": {
            "vocab_size": shape.vocab_size,
            "num_layers": shape.num_layers,
            "d_model": shape.d_model,
            "num_heads": attention.heads,
            "num_kv_heads": attention.kv_heads,
            "head_dim": attention.head_dim,
            "qk_norm": attention.qk_norm,
            "tie_embeddings": shape.tied,
            "num_experts": shape.num_experts,
            "top_k": shape.top_k,
            "expert_ffn_dim": shape.expert_ffn,
            "shared_expert_ffn_dim": shape.shared_ffn,
            "num_dense_layers": shape.num_dense_layers,
            "recompute": RECOMPUTE[str(known.layouts[0].degrees["recompute"])],
        },
        "inner": {"accumulation_steps": accumulate},
        "data": {"seq_len": seq_len},
    }
    if len(set(micro)) == 1:
        tree["inner"]["batch_size"] = micro[0]
    else:
        tree["inner"]["batch_size_by_site"] = micro
    if max(site.count for site in question.cluster.sites) > 1:
        tree["inner"]["parallel"] = "fsdp"
    if shape.num_dense_layers:
        tree["model"]["dense_ffn_dim"] = shape.dense_ffn
    if not shape.num_experts:
        # Without routed experts the trainer's dense FFN has the active width.
        tree["model"] |= {"ffn": "dense", "num_experts": 1, "top_k": 1}
        tree["model"]["expert_ffn_dim"] = shape.dense_ffn
    tree["sync"] = {
        "fragments": question.fragments,
        "overlap_steps": question.overlap_steps,
    }
    if len(set(micro)) > 1:
        tree["sync"]["weight"] = "tokens"
    if codec := codec_of(question.bits):
        tree["sync"]["codec"] = codec
    if question.method.placed:
        tree["placement"] = _placement(question)
    return tree


def _batches(question: Question, known: Answered) -> tuple[list[int], int]:
    """Sequences of every site's micro-batch, and how many of them make a step.

    A micro-batch is what a site's accelerators share equally, and none is larger than planned. Of
    up to twice as many as are needed, the number that comes nearest to the planned shares is taken.
    """
    ranks, seq_len = [site.count for site in question.cluster.sites], question.inside.seq_len
    wanted = [
        max(1, round(tokens / seq_len / count))
        for tokens, count in zip(known.tokens.tolist(), ranks, strict=True)
    ]
    most = [int(one.degrees["micro"]) for one in known.layouts]
    fewest = max(-(-each // limit) for each, limit in zip(wanted, most, strict=True))

    def micro(number: int) -> list[int]:
        return [max(1, round(each / number)) for each in wanted]

    def deviation(number: int) -> float:
        return max(
            abs(size * number - each) / each
            for size, each in zip(micro(number), wanted, strict=True)
        )

    accumulate = min(range(fewest, 2 * fewest + 1), key=deviation)
    sizes = zip(ranks, micro(accumulate), strict=True)
    return [count * size for count, size in sizes], accumulate


def _placement(question: Question) -> dict[str, Any]:
    factor = cyclic_factor(question)
    if factor:
        return {"kind": "cyclic", "replication_factor": factor}
    return {"kind": "cyclic", "capacity": [int(n) for n in question.holdings.residents[0]]}


def cyclic_factor(question: Question) -> int:
    """Holders per expert of the even placement that a question has; 0 for any other."""
    factor = max(1, round(question.replication))
    even = cyclic_holdings(question.shape, question.cluster.num_sites, factor)
    return factor if np.array_equal(even.residents, question.holdings.residents) else 0


def start_line(path: str | Path, sites: Sequence[Site]) -> str:
    """The command that starts a plan, with the place where it is given; SITE0_ADDRESS is left to
    say, and SITE where all sites are started alike."""
    lines = [_start(path, site, len(sites), number) for number, site in enumerate(sites)]
    if len({site.count for site in sites}) == 1:
        return f"at every site: {_start(path, sites[0], len(sites), 'SITE')}"
    return "; ".join(f"at site {number}: {line}" for number, line in enumerate(lines))


def _start(path: str | Path, site: Site, num_sites: int, number: int | str) -> str:
    """The command of one site.

    A site of several machines has a torchrun on each of them, which join at MACHINE0.
    """
    count, node, file = site.count, site.accelerator.node, shlex.quote(str(path))
    if count <= node:
        ranks = f" --ranks {count}" if count > 1 else ""
        return f"launch/site.sh {number} {num_sites} SITE0_ADDRESS {file}{ranks}"
    machines = -(-count // node)
    each = count // machines
    if each * machines != count:  # no equal share for every machine
        machines, each = count, 1
    words = f"torchrun --nnodes {machines} --nproc-per-node {each}"
    words += " --rdzv-backend c10d --rdzv-endpoint MACHINE0"
    return f"{words} -m fomoe train {file} --site {number} --meet SITE0_ADDRESS"


def write_config(path: str | Path, tree: dict[str, Any], sites: Sequence[Site]) -> str:
    """Write a plan as a config, checked by the trainer's own loader; returns what starts it, and
    where.

    Raises:
        ConfigError: naming the rule that the config breaks, or why it cannot be written.
    """
    config = build_config(tree)
    for number, site in enumerate(sites):
        check_ranks(config, site.count, number)
    line = start_line(path, sites)
    head = (
        "# Written by fomoe plan.\n"
        "# data.source and data.tokenizer are the defaults: name your own text.\n"
        f"# Start it {line}\n"
    )
    try:
        text = head + yaml.safe_dump(tree, sort_keys=False)
        Path(path).write_text(text, encoding="utf-8")
    except OSError as error:
        raise ConfigError("--out", path, f"cannot be written: {error.strerror}") from None
    return line
