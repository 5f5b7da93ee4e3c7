"""Rules over several options where sites train adapters (no torch)."""

from __future__ import annotations

from fomoe.adapters.base import read_base
from fomoe.adapters.options import AdaptersConfig
from fomoe.config import ADAPTER_METHODS, Config, ModelConfig, RouterConfig
from fomoe.errors import ConfigError

_MOST_RANK = 65_536


def check_adapters(config: Config) -> None:
    """Check the options of adapters, and that a run of the other kind has none.

    Raises:
        ConfigError: naming the first field, value and rule that do not hold.
    """
    adapters, data = config.adapters, config.data
    if adapters.base is None:
        _check_unused(config)
        return
    if config.method not in ADAPTER_METHODS:
        rule = f"does not train adapters (adapters.base); choose from {', '.join(ADAPTER_METHODS)}"
        raise ConfigError("method", config.method, rule)
    if len(adapters.ranks) != config.num_sites:
        rule = f"must have one rank for each of the {config.num_sites} sites (num_sites)"
        raise ConfigError("adapters.ranks", list(adapters.ranks), rule)
    for rank in adapters.ranks:
        if not 1 <= rank <= _MOST_RANK:
            rule = f"has the rank {rank}; every rank must be from 1 to {_MOST_RANK}"
            raise ConfigError("adapters.ranks", list(adapters.ranks), rule)
    if not adapters.targets:
        raise ConfigError("adapters.targets", "[]", "must name a layer")
    base = read_base(adapters.base)
    for name, (out, inner) in base.targets(adapters.targets).items():
        if max(adapters.ranks) > min(out, inner):
            rule = f"exceeds the size {out} x {inner} of {name}"
            raise ConfigError("adapters.ranks", max(adapters.ranks), rule)
    _check_no_model(config)
    _check_server(config)
    if data.tokenizer in ("bpe", "none") or (data.fixed_vocab_size or 0) > base.vocab_size:
        rule = f"must be the base's own: a tokenizer of at most {base.vocab_size} tokens"
        raise ConfigError("data.tokenizer", data.tokenizer, rule)
    if data.dirichlet_alpha is not None and data.client_field is None:
        rule = "needs data.client_field, whose values it shares out"
        raise ConfigError("data.dirichlet_alpha", data.dirichlet_alpha, rule)
    if data.format == "text" and data.client_field is not None:
        rule = "is for data.format prompt-completion; text has one source per client (data.sites)"
        raise ConfigError("data.client_field", data.client_field, rule)
    if data.format == "prompt-completion":
        for field in ("sites", "held_out", "num_shards"):
            if getattr(data, field) is not None:
                rule = "has no meaning for data.format prompt-completion"
                raise ConfigError(f"data.{field}", getattr(data, field), rule)


def _check_unused(config: Config) -> None:
    """Without a base there are no adapters, and no option of theirs."""
    if config.method in ADAPTER_METHODS:
        rule = "needs the frozen base that adapters are trained on (adapters.base)"
        raise ConfigError("method", config.method, rule)
    for name, value in config.adapters:
        if value != AdaptersConfig.model_fields[name].default:
            raise ConfigError(f"adapters.{name}", value, "needs adapters.base")
    if config.data.format != "text":
        raise ConfigError("data.format", config.data.format, "needs adapters.base")
    for name in ("client_field", "dirichlet_alpha"):
        if getattr(config.data, name) is not None:
            raise ConfigError(f"data.{name}", getattr(config.data, name), "needs adapters.base")


def _check_no_model(config: Config) -> None:
    """The base is the model: options that describe another one would do nothing."""
    for section, plain in (("model", ModelConfig(ffn="dense")), ("router", RouterConfig())):
        for name, value in getattr(config, section):
            if value != getattr(plain, name):
                rule = "has no meaning beside adapters.base, which is the model"
                raise ConfigError(f"{section}.{name}", value, rule)
    if config.init_from is not None:
        rule = "has no meaning beside adapters.base, which is where training starts from"
        raise ConfigError("init_from", config.init_from, rule)
    if config.run.park == "always":
        raise ConfigError("run.park", "always", "has no meaning for adapters, which are small")


def _check_server(config: Config) -> None:
    adapters, outer = config.adapters, config.outer
    if adapters.participation < 1 and config.sync.weight == "uniform":
        rule = "counts clients that do not take part (adapters.participation); take presence"
        raise ConfigError("sync.weight", "uniform", rule)
    if adapters.participation < 1 and adapters.keep_optimizer:
        rule = (
            "does not fit adapters.participation below 1: a client that rests would keep old state"
        )
        raise ConfigError("adapters.keep_optimizer", "true", rule)
    _check_pruning(adapters)
    if config.sync.single_holder == "local":
        rule = "has no meaning for adapters: the largest rank may have one holder"
        raise ConfigError("sync.single_holder", "local", rule)
    if adapters.aggregate != "segments" and config.sync.codec != "fp32":
        rule = f"must be fp32 for adapters.aggregate {adapters.aggregate}, which takes exact values"
        raise ConfigError("sync.codec", config.sync.codec, rule)
    if adapters.aggregate != "segments" and outer.arguments != {
        "lr": 1.0, "momentum": 0.0, "nesterov": False
    }:  # fmt: skip
        rule = f"must be SGD with lr 1 and momentum 0 for adapters.aggregate {adapters.aggregate}"
        raise ConfigError("outer.optimizer", outer.optimizer, rule)


def _check_pruning(adapters: AdaptersConfig) -> None:
    default = AdaptersConfig.model_fields["prune_weight"].default
    if adapters.prune_keep is None:
        if adapters.prune_weight != default:
            rule = "needs adapters.prune_keep"
            raise ConfigError("adapters.prune_weight", adapters.prune_weight, rule)
        return
    if adapters.aggregate != "hetlora":
        rule = f"is for adapters.aggregate hetlora, not {adapters.aggregate}"
        raise ConfigError("adapters.prune_keep", adapters.prune_keep, rule)
    if adapters.nesting != "none":
        rule = f"does not fit adapters.nesting {adapters.nesting}: a client's rank would change"
        raise ConfigError("adapters.prune_keep", adapters.prune_keep, rule)
