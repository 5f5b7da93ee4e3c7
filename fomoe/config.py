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
    IntTuple,
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

    backend: Literal["auto", "split", "grouped_mm", "megablocks"] = "auto"
    """How the products are computed. auto: grouped_mm in bf16 on compute capability 9 and
    newer, else split."""


class ModelConfig(Options):
    """Shapes of the network; every name is the field's usual one."""

    vocab_size: Positive | None = None
    """[tokens] Rows of the embedding; null: the tokenizer's size, which it may exceed."""
    num_layers: Positive = 4
    """[layers] Depth of the decoder."""
    d_model: Positive = 256
    """[elements] Width of the residual stream."""
    num_heads: Positive = 4
    """[heads] Heads of the queries."""
    num_kv_heads: Positive | None = None
    """[heads] Heads of keys and values; null: num_heads."""
    head_dim: Positive | None = None
    """[elements] Width of a head; null: d_model / num_heads."""
    qk_norm: Literal["none", "head", "full"] = "none"
    """RMS norm of queries and keys: none, over each head, or over the full width."""
    rope_theta: PositiveFloat = 10_000.0
    """Base of the rotary position embedding."""
    norm_eps: PositiveFloat = 1e-5
    """Added to the mean square in every RMS norm."""
    init_std: PositiveFloat = 0.02
    """Standard deviation of the initial weights."""
    tie_embeddings: bool = False
    """Whether the output layer uses the embedding's weights."""
    ffn: Literal["moe", "dense"] = "moe"
    """moe: routed experts. dense: one FFN of the same active width, no experts."""
    num_experts: Positive = 8
    """[experts] Routed experts of a layer, over all sites."""
    top_k: Positive = 2
    """[experts] Experts that a token chooses in a layer."""
    expert_ffn_dim: Positive = 256
    """[elements] Hidden width of one routed expert."""
    expert_ffn_scale: PositiveFloat = 1.0
    """Multiplies expert_ffn_dim; 0.5 gives experts of half the width."""
    shared_expert_ffn_dim: NonNegative = 0
    """[elements] Hidden width of the always-on FFN beside the routed experts; 0: none."""
    num_dense_layers: NonNegative = 0
    """[layers] The first layers, which have a dense FFN instead of experts."""
    dense_ffn_dim: Positive | None = None
    """[elements] Hidden width of that dense FFN; null: the active width of an MoE layer."""
    experts: ExpertsConfig = ExpertsConfig()
    """How the resident experts are computed."""
    recompute: Literal["none", "experts", "layers"] = "none"
    """Activations that the backward pass computes again to save memory: none, the experts'
    hidden ones, or all of every layer."""
    matmul: Literal["auto", "torch", "onednn"] = "auto"
    """Products in fp32 on CPU. auto: oneDNN where torch's own keep to half of the vector width."""

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
    """How logits become scores: softmax over all experts, or a sigmoid of each."""
    gate_norm: Literal["selected", "none", "survivors"] = "selected"
    """Gates are divided by the sum over the token's selected experts, by nothing, or by the
    sum over the selected ones that are resident (survivors)."""
    route_scope: Literal["all", "resident"] = "all"
    """Experts that the top-k is taken from. resident: absent experts are masked before it."""
    at_least_one: bool = True
    """Whether a token whose choices are all absent takes its best resident expert."""
    execute_target: Fraction | None = None
    """[share] Executed share of assignments to hold by a selection bias; null: no bias."""
    execute_rate: PositiveFloat = 0.01
    """Step of that bias per inner step."""
    skip_scale: Literal["none", "inverse"] = "inverse"
    """Scale of the routed output where tokens skip, unless gate_norm is survivors. inverse: all
    experts over resident ones."""
    balance: Literal["loss", "bias", "both"] = "loss"
    """What balances the load: the loss, a selection bias, or both."""
    bias_rate: PositiveFloat = 0.01
    """Step of the balance bias per round, where balance is bias or both."""
    lb_loss: NonNegativeFloat = 0.01
    """Coefficient of the load-balancing loss."""
    z_loss: NonNegativeFloat = 0.001
    """Coefficient of the router z-loss."""


class InnerConfig(Options):
    """Local training at one site."""

    optimizer: Literal["adamw", "sgd"] = "adamw"
    """Optimizer of the local steps."""
    lr: PositiveFloat = 1e-3
    """Learning rate after the warm-up."""
    beta1: Decay = 0.9
    """AdamW's decay of the mean gradient."""
    beta2: Decay = 0.95
    """AdamW's decay of the mean squared gradient."""
    eps: PositiveFloat = 1e-8
    """AdamW's term in the denominator."""
    momentum: Fraction = 0.0
    """Momentum of inner SGD."""
    weight_decay: NonNegativeFloat = 0.1
    """Weight decay of matrices; norms are not decayed."""
    warmup_fraction: Fraction = 0.05
    """[share] Part of the schedule's steps in which the learning rate rises."""
    min_lr_fraction: Fraction = 0.1
    """[share] Learning rate at the end of the cosine, as a part of lr."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """Learning rate after the warm-up: a cosine to its minimum, or constant."""
    schedule_steps: Positive | None = None
    """[steps] Horizon of the schedule; null: rounds x local_steps. It may change on --resume,
    so that more rounds can keep the old one."""
    clip_norm: NonNegativeFloat = 1.0
    """Largest norm of a site's gradients; 0: they are not clipped."""
    batch_size: Positive = 8
    """[sequences] Micro-batch of one site."""
    batch_size_by_site: IntTuple | None = None
    """[sequences] One micro-batch per site instead of batch_size, for sites of different speed, so
    that they end a round together. Where they differ, sync.weight must be tokens or uniform."""
    accumulation_steps: Positive = 1
    """[micro-batches] Gradients that are summed for one inner step."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """auto: bf16 autocast on accelerators, fp32 on CPU."""
    parallel: Literal["none", "ddp", "fsdp"] = "none"
    """How the ranks of a site share the work, where it has several (--ranks-per-site): each has all
    parameters and a part of the batch (ddp), or a part of both (fsdp, torch's FSDP2)."""


class OuterConfig(Options):
    """The optimizer that steps the anchor with the averaged pseudo-gradient, once per round."""

    optimizer: Text = "SGD"
    """Any elementwise class of torch.optim, by name."""
    lr: NonNegativeFloat = 0.7
    """Learning rate of the outer step."""
    momentum: Fraction | None = None
    """Momentum of outer SGD; null: 0.9."""
    nesterov: bool | None = None
    """Whether outer SGD uses Nesterov momentum; null: true if there is momentum."""
    options: dict[str, Any] = Field(default_factory=dict)
    """Further arguments of the class."""

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

    average: Literal["parameters", "gradients"] = "parameters"
    """parameters: their pseudo-gradients, once per round. gradients: at every step (DDP)."""
    weight: Literal["presence", "tokens", "uniform"] = "presence"
    """A site's part in the mean: equal among those that trained the segment (presence), by
    its tokens, or equal always (uniform)."""
    router_rows: Literal["all", "holders"] = "all"
    """Sites whose updates count for an expert's row of the router: all, or its holders."""
    codec: Literal["fp32", "bf16", "int8", "int4"] = "fp32"
    """What pseudo-gradients and their means are sent as. int8, int4: blocks of 128 with a bf16
    scale. What a codec leaves out of one sync is added to the next (error feedback)."""
    fragments: Positive = 1
    """[parts] Parts of the layers that are synced one after the other, one every local_steps /
    fragments steps (Streaming DiLoCo); 1: all at the round's end. It must divide both."""
    fragment_order: Literal["strided", "contiguous"] = "strided"
    """Layers of a fragment: every fragments-th layer, or neighbours."""
    overlap_steps: NonNegative = 0
    """[steps] Local steps that run beside a sync before its result is merged, fewer than
    local_steps / fragments; 0: none."""
    mix: Fraction | None = None
    """[share] Of a site's own values in what is merged after such steps, the rest being what all
    holders got; null: 0.5 where overlap_steps is above 0."""
    single_holder: Literal["outer", "local"] = "outer"
    """A segment with one holder takes the outer step, or stays as trained (local)."""
    timeout_s: Annotated[float, Field(ge=1, le=1_000_000, allow_inf_nan=False)] = 600.0
    """[seconds] Longest wait for a peer that sends nothing."""
    join_timeout_s: Annotated[float, Field(ge=1, le=1_000_000, allow_inf_nan=False)] | None = None
    """[seconds] Longest wait for all sites to join, which may be hours where sites wait in queues;
    null: timeout_s."""
    verify_replicas: bool = True
    """Whether the holders compare hashes of their replicas at every round's end."""
    probe: bool | None = None
    """Whether the sites measure their links at the start, a second per pair, and site 0 prints them
    beside the time of a sync; null: up to 8 sites."""

    @property
    def own_share(self) -> float:
        """Share of a site's own values in what it takes from a sync."""
        return (0.5 if self.mix is None else self.mix) if self.overlap_steps else 0.0


class DataConfig(Options):
    """Text, tokens and their split over sites."""

    source: Text = "python-stdlib"
    """python-stdlib, a text file or glob, package:NAME/GLOB (files of an installed package), token
    shards (*.bin, *.npy), or hf:NAME."""
    sites: TextTuple | None = None
    """One source per site, or per part, instead of `source`."""
    held_out: Text | None = None
    """Source of the held-out part; null: held_out_fraction of the text."""
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05
    """[share] Part of the documents that is held out."""
    held_out_sequences: Positive = 64
    """[sequences] How many held-out sequences every evaluation reads."""
    tokenizer: Text = "byte"
    """byte, bpe (trained on the text), none (token shards), or a tokenizer's file, folder or
    name."""
    bpe_vocab_size: Annotated[int, Field(ge=257, le=MOST)] = 4096
    """[tokens] Size of the vocabulary that bpe trains."""
    seq_len: Annotated[int, Field(ge=2, le=MOST)] = 256
    """[tokens] Length of a training sequence."""
    num_shards: Positive | None = None
    """[parts] Parts that the training text is split into; null: num_sites."""
    deal: Literal["random", "clusters"] = "random"
    """How the documents of a text source are dealt to the parts: at random, or by kind, so that
    documents whose n-grams resemble each other are at one site."""
    text_field: Text = "text"
    """Column of a hub data set, or field of JSON Lines, that holds the text."""
    hub_split: Text = "train"
    """Split of a hub data set."""
    format: Literal["text", "prompt-completion"] = "text"
    """text, or JSON Lines with the fields prompt and completion, of which only the completion is
    learned; needs adapters.base."""
    client_field: Text | None = None
    """Field of the pairs that splits them over the clients; null: they are dealt evenly."""
    dirichlet_alpha: PositiveFloat | None = None
    """Concentration of the Dirichlet draw by which each value of client_field is shared out over
    the clients; null: each value has one client."""

    @property
    def fixed_vocab_size(self) -> int | None:
        """Vocabulary size that the tokenizer's name alone fixes, or None."""
        if self.tokenizer == "byte":
            return 257  # 256 bytes and the end-of-text token
        return self.bpe_vocab_size if self.tokenizer == "bpe" else None


class RunConfig(Options):
    """Where a run writes and how often; the numbers that training produces do not depend on it."""

    dir: Text | None = None
    """Folder of the run; null: runs/<name of the config file>."""
    checkpoint_every: NonNegative = 1
    """[rounds] Between checkpoints; 0: only at the end."""
    keep_checkpoints: Annotated[int, Field(ge=2, le=MOST)] = 3
    """[rounds] Newest checkpoints that are kept."""
    eval_every: NonNegative = 1
    """[rounds] Between evaluations of each site's own model; 0: only at the end."""
    eval_merged_every: NonNegative = 0
    """[rounds] Between evaluations of the merged model; 0: only at the end."""
    log_every: Positive = 10
    """[steps] Between plain progress lines."""
    park: Literal["auto", "never", "always"] = "auto"
    """Whether the waiting sites of a proxy run lie in pinned host memory. auto: where the
    state of all sites would take more than half of the accelerator's free memory."""
    wandb: Literal["off", "offline", "online"] = "off"
    """Whether wandb gets the records too; needs the extra fomoe[wandb]."""
    tensorboard: bool = False
    """Whether TensorBoard gets the records too; needs the extra fomoe[tensorboard]."""
    wandb_project: Text = "fomoe"
    """Project of the wandb runs."""


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
    "copies",
]
METHODS: tuple[str, ...] = get_args(Method)  # of pre-training
ADAPTER_METHODS: tuple[str, ...] = get_args(AdapterMethod)


class Config(Options):
    """One experiment: everything that decides its numbers, and `run`, which does not."""

    method: Literal[Method, AdapterMethod] = "fomoe"
    """FoMoE, or a baseline; its name sets other options (README, Configuration)."""
    num_sites: Positive = 4
    """[sites] Weakly connected places that train."""
    local_steps: Positive = 32
    """[steps] Inner steps of a round, H."""
    rounds: Positive = 10
    """[rounds] Rounds of local steps and a sync."""
    seed: Seed = 0
    """Of the initial weights, the split of the text and the order of the batches."""
    init_from: Text | None = None
    """Folder of a run or of an exported model whose parameters the sites start from; null: random
    ones. Shapes and function must be equal, the placement need not."""
    model: ModelConfig = ModelConfig()
    """Shapes of the network."""
    placement: PlacementConfig = CyclicPlacement()
    """Which site holds which expert."""
    router: RouterConfig = RouterConfig()
    """How tokens choose experts, and what happens when a chosen one is absent."""
    inner: InnerConfig = InnerConfig()
    """Local training at one site."""
    outer: OuterConfig = OuterConfig()
    """The optimizer that steps the anchor, once per round."""
    sync: SyncConfig = SyncConfig()
    """What crosses between sites and how it is averaged."""
    data: DataConfig = DataConfig()
    """Text, tokens and their split over sites."""
    adapters: AdaptersConfig = AdaptersConfig()
    """Fine-tuning of a frozen base with adapters of different ranks (docs/prelort.md)."""
    run: RunConfig = RunConfig()
    """Where a run writes and how often."""

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
    def batch_sizes(self) -> tuple[int, ...]:
        """Sequences of a micro-batch of every site."""
        return self.inner.batch_size_by_site or (self.inner.batch_size,) * self.num_sites

    @property
    def evaluation_batch_size(self) -> int:
        """Sequences that an evaluation reads at once, equal at all sites."""
        return min(self.batch_sizes)

    @property
    def tokens_per_step(self) -> tuple[int, ...]:
        """Tokens that every site trains on in one inner step."""
        sequences = self.inner.accumulation_steps * self.data.seq_len
        return tuple(size * sequences for size in self.batch_sizes)

    def to_yaml(self) -> str:
        return yaml.safe_dump(self.model_dump(mode="json"), sort_keys=False)

    def fingerprint(self, *, without: tuple[str, ...] = ("run",)) -> str:
        """Hash of every option but the named top-level ones; equal at all sites of a run."""
        tree = {k: v for k, v in self.model_dump(mode="json").items() if k not in without}
        return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()
