"""Every option of an experiment, in one frozen tree (no torch).

An experiment is one YAML file plus dotted overrides (`outer.lr=0.6`). All sites run the same file;
what differs between sites (site id, addresses, device) is a launch argument and never an option.
`load_config` merges, applies the method's settings, checks every rule once, and never changes a
value afterwards: what the file leaves out has its default here or is derived by a property.
"""

from __future__ import annotations

import hashlib
import json
from typing import Annotated, Any, Literal, get_args

import yaml
from pydantic import Field

from fomoe.adapters.base import read_base
from fomoe.adapters.options import AdapterMethod, AdaptersConfig
from fomoe.kinds import CyclicPlacement, PlacementConfig
from fomoe.options import (
    MOST,
    Decay,
    Fraction,
    NonNegative,
    NonNegativeFloat,
    Options,
    Positive,
    PositiveFloat,
    Seed,
    Text,
    TextTuple,
)


class ExpertsConfig(Options):
    """How the resident experts are computed; every choice gives the same numbers to rounding."""

    # auto: grouped_mm in bf16 on compute capability 9 and newer, else split.
    backend: Literal["auto", "split", "grouped_mm", "megablocks"] = "auto"


class ModelConfig(Options):
    """Shapes of the network; every name is the field's usual one."""

    vocab_size: Positive | None = None  # null: the tokenizer's; may exceed the tokenizer's
    num_layers: Positive = 4
    d_model: Positive = 256
    num_heads: Positive = 4
    num_kv_heads: Positive | None = None  # null: num_heads
    head_dim: Positive | None = None  # null: d_model / num_heads
    qk_norm: Literal["none", "head", "full"] = "none"
    rope_theta: PositiveFloat = 10_000.0
    norm_eps: PositiveFloat = 1e-5
    init_std: PositiveFloat = 0.02
    tie_embeddings: bool = False
    ffn: Literal["moe", "dense"] = "moe"  # dense: one FFN of the same active width, no experts
    num_experts: Positive = 8
    top_k: Positive = 2
    expert_ffn_dim: Positive = 256  # hidden width of one routed expert
    expert_ffn_scale: PositiveFloat = 1.0  # multiplies expert_ffn_dim (0.5: half-width experts)
    shared_expert_ffn_dim: NonNegative = 0  # always-on FFN beside the routed experts; 0: none
    num_dense_layers: NonNegative = 0  # the first layers that have a dense FFN
    dense_ffn_dim: Positive | None = None  # null: the active width of an MoE layer
    experts: ExpertsConfig = ExpertsConfig()
    # Activations computed again in the backward pass, for memory: the experts' hidden ones, or all
    # of every layer.
    recompute: Literal["none", "experts", "layers"] = "none"
    # Products in fp32 on CPU. auto: oneDNN where torch's own keep to half of the vector width.
    matmul: Literal["auto", "torch", "onednn"] = "auto"

    @property
    def kv_heads(self) -> int:
        return self.num_kv_heads or self.num_heads

    @property
    def head_size(self) -> int:
        return self.head_dim or self.d_model // self.num_heads

    @property
    def expert_width(self) -> int:
        return round(self.expert_ffn_dim * self.expert_ffn_scale)

    @property
    def active_width(self) -> int:
        """Hidden width that one token runs through: its top-k experts and the shared expert."""
        return self.top_k * self.expert_width + self.shared_expert_ffn_dim

    @property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices of the layers that have routed experts."""
        return tuple(range(self.num_dense_layers, self.num_layers)) if self.ffn == "moe" else ()

    def dense_width(self, layer: int) -> int:
        """Hidden width of the dense FFN of a layer without routed experts."""
        if layer < self.num_dense_layers and self.dense_ffn_dim is not None:
            return self.dense_ffn_dim
        return self.active_width


class RouterConfig(Options):
    """How tokens choose experts, and what happens when a chosen one is absent."""

    score: Literal["softmax", "sigmoid"] = "softmax"
    gate_norm: Literal["selected", "none", "survivors"] = "selected"
    route_scope: Literal["all", "resident"] = "all"  # resident: absent experts masked before top-k
    at_least_one: bool = True  # a token whose choices are all absent takes its best resident
    execute_target: Fraction | None = None  # executed share to hold by a selection bias
    execute_rate: PositiveFloat = 0.01  # step of that bias per inner step
    skip_scale: Literal["none", "inverse"] = "none"  # inverse: routed output x E/R
    balance: Literal["loss", "bias", "both"] = "loss"
    bias_rate: PositiveFloat = 0.01  # step of the balance bias per round (balance: bias or both)
    lb_loss: NonNegativeFloat = 0.01  # coefficient of the load-balancing loss
    z_loss: NonNegativeFloat = 0.001  # coefficient of the router z-loss


class InnerConfig(Options):
    """Local training at one site."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    lr: PositiveFloat = 1e-3
    beta1: Decay = 0.9
    beta2: Decay = 0.95
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.0  # of inner SGD
    weight_decay: NonNegativeFloat = 0.1  # matrices only; norms are not decayed
    warmup_fraction: Fraction = 0.05  # of the schedule's steps
    min_lr_fraction: Fraction = 0.1  # of lr, at the end of the cosine
    schedule: Literal["cosine", "constant"] = "cosine"
    # Horizon of the schedule; null: rounds x local_steps. May change on --resume, so that more
    # rounds can keep the old one.
    schedule_steps: Positive | None = None
    clip_norm: NonNegativeFloat = 1.0  # of this site's gradients; 0: off
    batch_size: Positive = 8  # sequences per micro-batch at one site
    accumulation_steps: Positive = 1  # micro-batches per inner step
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on accelerators


class OuterConfig(Options):
    """The optimizer that steps the anchor with the averaged pseudo-gradient, once per round."""

    optimizer: Text = "SGD"  # any elementwise class of torch.optim
    lr: NonNegativeFloat = 0.7
    momentum: Fraction | None = None  # SGD only; null: 0.9
    nesterov: bool | None = None  # SGD only; null: true if there is momentum
    options: dict[str, Any] = Field(default_factory=dict)  # further arguments of the class

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments of the torch.optim class, lr included."""
        arguments: dict[str, Any] = {"lr": self.lr, **self.options}
        if self.optimizer == "SGD":
            momentum = 0.9 if self.momentum is None else self.momentum
            nesterov = momentum > 0 if self.nesterov is None else self.nesterov
            arguments |= {"momentum": momentum, "nesterov": nesterov}
        return arguments


class SyncConfig(Options):
    """What crosses between sites and how it is averaged."""

    average: Literal["parameters", "gradients"] = "parameters"  # gradients: every step (DDP)
    weight: Literal["presence", "tokens", "uniform"] = "presence"
    router_rows: Literal["all", "holders"] = "all"  # whose updates count for an expert's router row
    single_holder: Literal["outer", "local"] = "outer"  # local: no outer step without a peer
    # Longest wait for a peer that sends nothing, and for all sites to join.
    timeout_s: Annotated[float, Field(ge=1, le=1_000_000, allow_inf_nan=False)] = 600.0
    verify_replicas: bool = True  # compare replica hashes over the holders after every sync


class DataConfig(Options):
    """Text, tokens and their split over sites."""

    source: Text = "python-stdlib"  # or a file or glob, *.bin / *.npy, or hf:NAME
    sites: TextTuple | None = None  # one source per site (or per part), instead of `source`
    held_out: Text | None = None  # a source of its own for the held-out part; null: a fraction
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of the documents
    held_out_sequences: Positive = 64  # sequences that every evaluation reads
    tokenizer: Text = "byte"  # byte, bpe, none (token shards), or a tokenizer's file or name
    bpe_vocab_size: Annotated[int, Field(ge=257, le=MOST)] = 4096
    seq_len: Annotated[int, Field(ge=2, le=MOST)] = 256
    num_shards: Positive | None = None  # parts the training text is split into; null: num_sites
    text_field: Text = "text"  # column of a hub data set, field of JSON Lines
    hub_split: Text = "train"  # split of a hub data set
    # prompt-completion: JSON Lines with these two fields; only the latter is learned (adapters).
    format: Literal["text", "prompt-completion"] = "text"
    client_field: Text | None = None  # field of the pairs that splits them over the clients
    # Every value of client_field is shared out by a draw with it; null: a value has one client.
    dirichlet_alpha: PositiveFloat | None = None

    @property
    def fixed_vocab_size(self) -> int | None:
        """Vocabulary size that the tokenizer's name alone fixes, or None."""
        if self.tokenizer == "byte":
            return 257  # 256 bytes and the end-of-text token
        return self.bpe_vocab_size if self.tokenizer == "bpe" else None


class RunConfig(Options):
    """Where a run writes and how often; the numbers that training produces do not depend on it."""

    dir: Text | None = None  # null: runs/<name of the config file>
    checkpoint_every: NonNegative = 1  # rounds; 0: only at the end
    keep_checkpoints: Annotated[int, Field(ge=2, le=MOST)] = 3  # newest rounds kept
    eval_every: NonNegative = 1  # rounds between evaluations of each site's own model; 0: at end
    eval_merged_every: NonNegative = 0  # rounds between evaluations of the merged model; 0: at end
    log_every: Positive = 10  # steps between plain progress lines
    # Waiting sites of a proxy run in pinned host memory. auto: where the state of all sites would
    # take more than half of the accelerator's free memory.
    park: Literal["auto", "never", "always"] = "auto"
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: Text = "fomoe"


Method = Literal[
    "fomoe",
    "diloco",
    "photon",
    "ddp",
    "spes",
    "resident-routing",
    "dense",
    "diloco-half",
    "single",
]
METHODS: tuple[str, ...] = get_args(Method)  # of pre-training
ADAPTER_METHODS: tuple[str, ...] = get_args(AdapterMethod)


class Config(Options):
    """One experiment: everything that decides its numbers, and `run`, which does not."""

    method: Literal[Method, AdapterMethod] = "fomoe"
    num_sites: Positive = 4
    local_steps: Positive = 32  # inner steps per round, H
    rounds: Positive = 10
    seed: Seed = 0
    # Folder of a run or of an exported model whose parameters the sites start from, instead of
    # random ones; shapes and function must be equal, the placement need not.
    init_from: Text | None = None
    model: ModelConfig = ModelConfig()
    placement: PlacementConfig = CyclicPlacement()
    router: RouterConfig = RouterConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    sync: SyncConfig = SyncConfig()
    data: DataConfig = DataConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    run: RunConfig = RunConfig()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: the base's, `model.vocab_size`, or the tokenizer's own size."""
        if self.adapters.base is not None:
            return read_base(self.adapters.base).vocab_size
        size = self.model.vocab_size or self.data.fixed_vocab_size
        assert size is not None  # check_config refuses a config without either
        return size

    @property
    def schedule_horizon(self) -> int:
        """Inner steps that the learning rate's schedule covers."""
        return self.inner.schedule_steps or self.rounds * self.local_steps

    @property
    def tokens_per_step(self) -> int:
        """Tokens that one site trains on in one inner step."""
        return self.inner.batch_size * self.inner.accumulation_steps * self.data.seq_len

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self, *, without: tuple[str, ...] = ("run",)) -> str:
        """Hash of every option but the named top-level ones; equal at all sites of a run."""
        tree = {k: v for k, v in self.model_dump(mode="json").items() if k not in without}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
