"""Rules that tie several options together (no torch): the field, the value and the rule."""

from __future__ import annotations

from typing import TYPE_CHECKING

from fomoe.errors import ConfigError
from fomoe.placement import build_placement

if TYPE_CHECKING:
    from fomoe.config import Config, OuterConfig


def check_config(config: Config) -> None:
    """Check the rules that tie several options together.

    Raises:
        ConfigError: naming the first field, value and rule that do not hold.
    """
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
    known = config.data.fixed_vocab_size
    if model.vocab_size is None and known is None:
        rule = f"must be set beside data.tokenizer {config.data.tokenizer}"
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
