"""Every option of an experiment, in one frozen tree (no torch).

An experiment is one YAML file plus dotted overrides (`outer.lr=0.6`). All sites run the same file;
what differs between sites (site id, addresses, device) is a launch argument and never stands here.
`load_config` merges, applies the method's settings, checks every rule once, and never changes a
value afterwards: what the file leaves out has its default here or is derived by a property.
"""

from __future__ import annotations

import copy
import difflib
import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fomoe.errors import ConfigError

Positive = Annotated[int, Field(ge=1)]
NonNegative = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(ge=0, le=1)]
# YAML has lists only; the tree is frozen, so it keeps tuples. Items stay strictly typed.
IntTuple = Annotated[tuple[int, ...], Field(strict=False)]
StrTuple = Annotated[tuple[str, ...], Field(strict=False)]
AnyTuple = Annotated[tuple[Any, ...], Field(strict=False)]


class Options(BaseModel):
    """Base of every section: unknown keys are errors, values are strict and frozen."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


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


class PlacementConfig(Options):
    """Which site holds which expert."""

    kind: Literal["cyclic", "common", "table"] = "cyclic"
    replication_factor: Positive | None = None  # holders per expert, r
    capacity: IntTuple | None = None  # most experts per layer that each site can hold
    num_common: NonNegative | None = None  # `common`: experts that every site holds
    table: AnyTuple | None = None  # `table`: sites per expert, for all layers or per MoE layer
    # all: every site stores every expert, and the placement says only who trains it (SPES).
    store: Literal["holders", "all"] = "holders"


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
    beta1: Fraction = 0.9
    beta2: Fraction = 0.95
    eps: PositiveFloat = 1e-8
    momentum: Fraction = 0.0  # of inner SGD
    weight_decay: NonNegativeFloat = 0.1  # matrices only; norms are not decayed
    warmup_fraction: Fraction = 0.05  # of the schedule's steps
    min_lr_fraction: Fraction = 0.1  # of lr, at the end of the cosine
    schedule: Literal["cosine", "constant"] = "cosine"
    schedule_steps: Positive | None = None  # horizon of the schedule; null: rounds x local_steps
    clip_norm: NonNegativeFloat = 1.0  # of this site's gradients; 0: off
    batch_size: Positive = 8  # sequences per micro-batch at one site
    accumulation_steps: Positive = 1  # micro-batches per inner step
    precision: Literal["auto", "fp32", "bf16"] = "auto"  # auto: bf16 autocast on accelerators


class OuterConfig(Options):
    """The optimizer that steps the anchor with the averaged pseudo-gradient, once per round."""

    optimizer: str = "SGD"  # any elementwise class of torch.optim
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
    timeout_s: PositiveFloat = 600.0  # longest wait for a peer that sends nothing
    verify_replicas: bool = True  # compare replica hashes over the holders after every sync


class DataConfig(Options):
    """Text, tokens and their split over sites."""

    source: str = "python-stdlib"  # python-stdlib, a file or glob, *.bin / *.npy, or hf:NAME
    sites: StrTuple | None = None  # one source per site, instead of `source`
    held_out: str | None = None  # a source of its own for the held-out part; null: a fraction
    held_out_fraction: Annotated[float, Field(gt=0, lt=1)] = 0.05  # of the documents
    held_out_sequences: Positive = 64  # sequences that every evaluation reads
    tokenizer: str = "byte"  # byte, bpe, none (token shards), or a tokenizer's file or name
    bpe_vocab_size: Annotated[int, Field(ge=257)] = 4096
    seq_len: Annotated[int, Field(ge=2)] = 256
    num_shards: Positive | None = None  # parts the training text is split into; null: num_sites
    text_field: str = "text"  # column of a hub data set
    hub_split: str = "train"  # split of a hub data set


class RunConfig(Options):
    """Where a run writes and how often; the numbers that training produces do not depend on it."""

    dir: str | None = None  # null: runs/<name of the config file>
    checkpoint_every: NonNegative = 1  # rounds; 0: only at the end
    keep_checkpoints: Annotated[int, Field(ge=2)] = 3  # newest rounds kept
    eval_every: NonNegative = 1  # rounds between evaluations of each site's own model; 0: at end
    eval_merged_every: NonNegative = 0  # rounds between evaluations of the merged model; 0: at end
    log_every: Positive = 10  # steps between plain progress lines
    # Waiting sites of a proxy run in pinned host memory. auto: where the state of all sites would
    # take more than half of the accelerator's free memory.
    park: Literal["auto", "never", "always"] = "auto"
    wandb: Literal["off", "offline", "online"] = "off"
    wandb_project: str = "fomoe"


METHODS = (
    "fomoe",
    "diloco",
    "photon",
    "ddp",
    "spes",
    "resident-routing",
    "dense",
    "diloco-half",
    "single",
)
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


class Config(Options):
    """One experiment: everything that decides its numbers, and `run`, which does not."""

    method: Method = "fomoe"
    num_sites: Positive = 4
    local_steps: Positive = 32  # inner steps per round, H
    rounds: Positive = 10
    seed: NonNegative = 0
    model: ModelConfig = ModelConfig()
    placement: PlacementConfig = PlacementConfig()
    router: RouterConfig = RouterConfig()
    inner: InnerConfig = InnerConfig()
    outer: OuterConfig = OuterConfig()
    sync: SyncConfig = SyncConfig()
    data: DataConfig = DataConfig()
    run: RunConfig = RunConfig()

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: `model.vocab_size`, or the tokenizer's own size."""
        known = tokenizer_vocab_size(self.data)
        size = self.model.vocab_size or known
        assert size is not None  # check_config refuses a config without either
        return size

    @property
    def schedule_steps(self) -> int:
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


def tokenizer_vocab_size(data: DataConfig) -> int | None:
    """Vocabulary size that the tokenizer's name alone fixes, or None."""
    if data.tokenizer == "byte":
        return 257  # 256 bytes and the end-of-text token
    return data.bpe_vocab_size if data.tokenizer == "bpe" else None


# ---------------------------------------------------------------------------------------- loading


def load_config(path: str | Path, overrides: list[str] | tuple[str, ...] = ()) -> Config:
    """Read a YAML experiment, apply dotted overrides and the method's settings, check every rule.

    Args:
        path: the YAML file.
        overrides: `section.option=value` strings; values are read as YAML.

    Raises:
        ConfigError: one line naming the field, the value and the rule that it breaks.
    """
    tree = read_yaml(path)
    explicit: dict[str, Any] = {}
    for override in overrides:
        field, value = parse_override(override)
        set_option(tree, field, value)
        explicit[field] = value
    return build_config(tree, explicit=explicit)


def read_yaml(path: str | Path) -> dict[str, Any]:
    """Read a YAML mapping; every failure names the file."""
    path = Path(path)
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        near = difflib.get_close_matches(path.name, [p.name for p in path.parent.glob("*.yaml")], 1)
        hint = f"; did you mean {path.parent / near[0]}?" if near else ""
        raise ConfigError("config", str(path), f"does not exist{hint}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError("config", str(path), f"cannot be read: {_one_line(error)}") from None
    try:
        tree = yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError("config", str(path), f"is not valid YAML: {_one_line(error)}") from None
    if tree is None:
        return {}
    if not isinstance(tree, dict):
        raise ConfigError("config", str(path), "must hold a mapping of options")
    return tree


def parse_override(override: str) -> tuple[str, Any]:
    field, equals, text = override.partition("=")
    if not equals or not field:
        raise ConfigError("override", override, "must have the form section.option=value")
    try:
        return field, yaml.load(text, Loader=_Loader)
    except yaml.YAMLError as error:
        raise ConfigError(field, text, f"is not valid YAML: {_one_line(error)}") from None


def set_option(tree: dict[str, Any], field: str, value: Any) -> None:
    *sections, option = field.split(".")
    node = tree
    for section in sections:
        child = node.setdefault(section, {})
        if not isinstance(child, dict):
            raise ConfigError(field, value, f"cannot be set: {section} is not a section")
        node = child
    node[option] = value


def build_config(tree: dict[str, Any], *, explicit: dict[str, Any] | None = None) -> Config:
    """Build and check a Config from nested dicts; `explicit` are options no method may overrule."""
    config = _parse(tree)
    settings = method_settings(config)
    for field, value in (explicit or {}).items():
        if field in settings and settings[field] != value:
            rule = f"contradicts method {config.method}, which sets {_yaml_word(settings[field])}"
            raise ConfigError(field, value, rule)
    tree = copy.deepcopy(tree)
    for field, value in settings.items():
        set_option(tree, field, value)
    config = _parse(tree)
    check_config(config)
    return config


def method_settings(config: Config) -> dict[str, Any]:
    """What a method's name sets: baselines are settings of the same system.

    The settings are absolute, so applying them to a resolved config changes nothing.
    """
    everywhere = {
        "placement.kind": "cyclic",
        "placement.replication_factor": config.num_sites,
        "placement.capacity": None,
        "placement.num_common": None,
        "placement.table": None,
        "placement.store": "holders",
    }
    plain_mean = {
        "outer.optimizer": "SGD",
        "outer.lr": 1.0,
        "outer.momentum": 0.0,
        "outer.nesterov": False,
        "outer.options": {},
    }
    # One site alone keeps the text that it would have had among the others.
    own_text: dict[str, Any] = {"data.num_shards": config.data.num_shards or config.num_sites}
    if config.data.sites:
        own_text = {"data.sites": list(config.data.sites[:1])}
    alone = {
        "num_sites": 1,
        "placement.replication_factor": 1,
        "sync.single_holder": "local",
        **own_text,
    }
    settings: dict[str, dict[str, Any]] = {
        "fomoe": {},
        "diloco": everywhere,
        "photon": {**everywhere, **plain_mean},
        "ddp": {**everywhere, "sync.average": "gradients"},
        "spes": {"placement.store": "all", "router.route_scope": "all", **plain_mean},
        "resident-routing": {"router.route_scope": "resident"},
        "dense": {**everywhere, "model.ffn": "dense"},
        "diloco-half": {**everywhere, "model.expert_ffn_scale": 0.5},
        "single": {**everywhere, **alone},
    }
    return settings[config.method]


def _parse(tree: dict[str, Any]) -> Config:
    _refuse_unknown(tree, Config, "")
    try:
        return Config.model_validate(tree)
    except ValidationError as error:
        raise _first_problem(error) from None


def _refuse_unknown(tree: Any, section: type[Options], prefix: str) -> None:
    """An unknown key is an error that names the nearest valid one, wherever that one stands."""
    for key, value in tree.items():
        field = f"{prefix}{key}"
        if key not in section.model_fields:
            near = _nearest(field, list(option_names(Config)))
            raise ConfigError(field, "", f"is not an option; did you mean {near}?")
        kind = section.model_fields[key].annotation
        if isinstance(kind, type) and issubclass(kind, Options):
            if not isinstance(value, dict):
                raise ConfigError(field, value, "must be a section of options")
            _refuse_unknown(value, kind, f"{field}.")


def option_names(section: type[Options], prefix: str = "") -> Iterator[str]:
    """Dotted names of every option of a section."""
    for name, info in section.model_fields.items():
        if isinstance(info.annotation, type) and issubclass(info.annotation, Options):
            yield from option_names(info.annotation, f"{prefix}{name}.")
        else:
            yield f"{prefix}{name}"


def _nearest(name: str, names: list[str]) -> str:
    """Nearest valid option: by its own name first, then by the whole path."""
    last = name.rsplit(".", 1)[-1]

    def likeness(candidate: str) -> tuple[float, float]:
        own = difflib.SequenceMatcher(None, last, candidate.rsplit(".", 1)[-1]).ratio()
        return own, difflib.SequenceMatcher(None, name, candidate).ratio()

    return max(names, key=likeness)


_RULES = {
    "greater_than_equal": "must be at least {ge}",
    "greater_than": "must be greater than {gt}",
    "less_than_equal": "must be at most {le}",
    "less_than": "must be less than {lt}",
    "int_type": "must be an integer",
    "int_from_float": "must be an integer",
    "float_type": "must be a number",
    "finite_number": "must be a finite number",
    "bool_type": "must be true or false",
    "string_type": "must be text",
    "literal_error": "must be one of {expected}",
    "tuple_type": "must be a list",
    "dict_type": "must be a mapping",
}


def _first_problem(error: ValidationError) -> ConfigError:
    problem = error.errors()[0]
    field = ".".join(str(part) for part in problem["loc"])
    rule = _RULES.get(problem["type"], problem["msg"]).format(**problem.get("ctx", {}))
    return ConfigError(field, _yaml_word(problem["input"]), rule.replace("'", ""))


def _yaml_word(value: Any) -> str:
    """A value as the user would write it in YAML."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    return repr(value)


# ------------------------------------------------------------------------------------------ rules


def check_config(config: Config) -> None:
    """Check the rules that tie several options together.

    Raises:
        ConfigError: naming the first field, value and rule that do not hold.
    """
    from fomoe.placement import build_placement  # placement stands after config in the data flow

    _check_model(config)
    _check_outer(config.outer)
    _check_data(config)
    placement = build_placement(config)
    if config.router.route_scope == "resident" and config.model.ffn == "moe":
        fewest = min(placement.num_residents(site) for site in range(config.num_sites))
        if fewest < config.model.top_k:
            rule = f"needs at least top_k = {config.model.top_k} experts per layer and site; "
            raise ConfigError("router.route_scope", "resident", rule + f"a site holds {fewest}")
    if config.sync.average == "gradients" and not placement.full:
        rule = "needs every expert on every site (replication_factor = num_sites)"
        raise ConfigError("sync.average", "gradients", rule)


def _check_model(config: Config) -> None:
    model = config.model
    known = tokenizer_vocab_size(config.data)
    if model.vocab_size is None and known is None:
        rule = f"is needed beside data.tokenizer {config.data.tokenizer}"
        raise ConfigError("model.vocab_size", "null", rule)
    if model.vocab_size is not None and known is not None and model.vocab_size < known:
        raise ConfigError(
            "model.vocab_size", model.vocab_size, f"is below the tokenizer's {known} tokens"
        )
    if model.head_dim is None and model.d_model % model.num_heads:
        rule = f"does not divide d_model {model.d_model}; set model.head_dim"
        raise ConfigError("model.num_heads", model.num_heads, rule)
    if model.head_size % 2:
        raise ConfigError("model.head_dim", model.head_size, "must be even (rotary positions)")
    if model.num_heads % model.kv_heads:
        rule = f"does not divide num_heads {model.num_heads}"
        raise ConfigError("model.num_kv_heads", model.kv_heads, rule)
    if model.top_k > model.num_experts:
        rule = f"exceeds the {model.num_experts} experts (model.num_experts)"
        raise ConfigError("model.top_k", model.top_k, rule)
    if model.num_dense_layers > model.num_layers:
        rule = f"exceeds the {model.num_layers} layers (model.num_layers)"
        raise ConfigError("model.num_dense_layers", model.num_dense_layers, rule)
    if model.expert_width < 1:
        rule = f"leaves no width of expert_ffn_dim {model.expert_ffn_dim}"
        raise ConfigError("model.expert_ffn_scale", model.expert_ffn_scale, rule)


def _check_outer(outer: OuterConfig) -> None:
    if outer.optimizer != "SGD":
        for name in ("momentum", "nesterov"):
            if getattr(outer, name) is not None:
                rule = f"is an option of SGD, not of {outer.optimizer}; use outer.options"
                raise ConfigError(f"outer.{name}", getattr(outer, name), rule)
    clash = {"lr", "momentum", "nesterov"} & set(outer.options)
    if clash and (outer.optimizer == "SGD" or "lr" in clash):
        name = sorted(clash)[0]
        raise ConfigError(f"outer.options.{name}", outer.options[name], f"is set by outer.{name}")
    if outer.arguments.get("nesterov") and not outer.arguments.get("momentum"):
        raise ConfigError("outer.nesterov", "true", "needs outer.momentum above 0")


def _check_data(config: Config) -> None:
    data = config.data
    if data.sites is not None and len(data.sites) != config.num_sites:
        rule = f"must name one source for each of the {config.num_sites} sites"
        raise ConfigError("data.sites", list(data.sites), rule)
    if data.sites is not None and data.num_shards is not None:
        raise ConfigError("data.num_shards", data.num_shards, "has no meaning beside data.sites")
    if data.num_shards is not None and data.num_shards < config.num_sites:
        rule = f"must be at least num_sites {config.num_sites}"
        raise ConfigError("data.num_shards", data.num_shards, rule)
    sources = [*(data.sites or (data.source,)), *([data.held_out] if data.held_out else [])]
    for source in sources:
        shards = source.endswith((".bin", ".npy"))
        if shards != (data.tokenizer == "none"):
            rule = "must be none for token shards" if shards else f"cannot read text {source}"
            raise ConfigError("data.tokenizer", data.tokenizer, rule)


# ------------------------------------------------------------------------------------------- YAML


class _Loader(yaml.SafeLoader):
    """YAML with the number and truth words people expect, and no silently repeated keys.

    YAML 1.1, which PyYAML follows, reads `3e-4` as text and `off` as false.
    """

    def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        for key in keys:
            if not isinstance(key, str):
                raise yaml.YAMLError(f"key {key!r} must be text")
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"key {key!r} stands twice")
        return super().construct_mapping(node, deep=deep)


_Loader.yaml_implicit_resolvers = {
    first: [(tag, pattern) for tag, pattern in pairs if not tag.endswith((":bool", ":float"))]
    for first, pairs in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver("tag:yaml.org,2002:bool", re.compile(r"^(true|false)$"), list("tf"))
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(
        r"^[-+]?([0-9][0-9_]*\.[0-9_]*([eE][-+]?[0-9]+)?|[0-9]+[eE][-+]?[0-9]+"
        r"|\.[0-9]+([eE][-+]?[0-9]+)?|\.(inf|nan))$"
    ),
    list("-+0123456789."),
)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())
