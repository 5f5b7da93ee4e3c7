"""The model card of an exported checkpoint: what the model is, how it was trained, its loss."""

from __future__ import annotations

import json
import math
from pathlib import Path

from fomoe.jsonlines import read_lines
from fomoe.metrics import metrics_path
from fomoe.planning import planned_summary
from fomoe.whole import WholeModel


def model_card(whole: WholeModel, format_name: str, dtype: str, *, has_tokenizer: bool) -> str:
    """README.md of an exported folder."""
    config, model = whole.config, whole.config.model
    planned = planned_summary(whole.plan)
    tokens = whole.round_idx * config.local_steps * sum(config.tokens_per_step)
    experts = f"{model.num_experts}, top-{model.top_k}" if model.moe_layers else "none"
    facts = {
        "parameters": f"{planned['params_total']:,}, {active_parameters(whole):,} per token",
        "layers, width, heads": f"{model.num_layers}, {model.d_model}, {model.num_heads}",
        "routed experts per layer": experts,
        "vocabulary": f"{config.vocab_size:,}",
        "sequence length": f"{config.data.seq_len:,} tokens",
        "method": config.method,
        "sites": str(config.num_sites),
        "holders per expert": f"{planned['replication_factor']:g}",
        "rounds of local steps": f"{whole.round_idx} of {config.local_steps}",
        "tokens, all sites": f"{tokens:,}",
        "data": ", ".join(config.data.sites or (config.data.source,)),
        "merged validation loss": _loss_text(recorded_loss(whole.run_dir, whole.round_idx)),
        "type of the values": dtype,
    }
    lines = [f"| {name} | {value} |" for name, value in facts.items()]
    load = 'model = AutoModelForCausalLM.from_pretrained("FOLDER")'
    if has_tokenizer:
        load += '\ntokenizer = AutoTokenizer.from_pretrained("FOLDER")'
    names = "AutoModelForCausalLM" + (", AutoTokenizer" if has_tokenizer else "")
    without = (
        "" if has_tokenizer else "\nThe run was trained on token shards: no tokenizer is here.\n"
    )
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [moe, federated, {format_name}]
---

# A model trained by FoMoE

One Mixture-of-Experts model, trained across sites that each hold only some of its experts, and
merged: every expert is taken from one of its holders. The format is transformers' `{format_name}`.

| | |
|---|---|
{chr(10).join(lines)}

```python
from transformers import {names}

{load}
```
{without}
It is a base model: nothing has aligned or filtered it. Its config and records are in the run's
folder.
"""


def active_parameters(whole: WholeModel) -> int:
    """Parameters that a token runs through: all but the routed experts that it does not choose."""
    model = whole.config.model
    expert = 3 * model.d_model * model.expert_width
    idle = (model.num_experts - model.top_k) * len(model.moe_layers)
    return whole.plan.segment_plan.numel - idle * expert


def recorded_loss(run_dir: Path, round_idx: int) -> float | None:
    """The merged loss of a round, in nats per token, from the run's records; None if not there."""
    try:
        summary = json.loads((run_dir / "summary.json").read_bytes())
        if summary["rounds"] == round_idx:
            return float(summary["val_loss_merged"])
    except (OSError, ValueError, LookupError, TypeError):
        pass  # a run that has not ended has no summary
    try:
        records = read_lines(metrics_path(run_dir, 0)).objects
        losses = [
            float(row["val_loss_merged"])
            for _, _, row in records
            if row.get("kind") == "merged" and row.get("round") == round_idx - 1
        ]
    except (OSError, ValueError, LookupError, TypeError):
        return None
    return losses[-1] if losses else None


def _loss_text(loss: float | None) -> str:
    if loss is None:
        return "not recorded for this round (`fomoe eval` computes it)"
    return f"{loss:.4f} nats per token (perplexity {math.exp(min(loss, 700)):.3f})"
