"""Rules that tie several options together (no torch): the field, the value and the rule."""

from __future__ import annotations

import math

from fomoe.adapters.rules import check_adapters
from fomoe.config import Config, OuterConfig
from fomoe.copies import set_size
from fomoe.errors import ConfigError
from fomoe.hints import hint
from fomoe.kinds import CopiesPlacement
from fomoe.placement import build_placement

# Classes of torch.optim whose step works element by element, as anchors of segments require. The
# others need a closure, sparse gradients or matrices. A test compares the list with torch.
ELEMENTWISE_OPTIMIZERS = (
    *("SGD", "Adam", "AdamW", "Adamax", "NAdam", "RAdam"),
    *("Adagrad", "Adadelta", "RMSprop", "Rprop", "ASGD"),
)
# No real model is larger; a mistyped size would only fill the memory, or overflow.
_MOST_SITES, _MOST_LAYERS, _MOST_EXPERTS = 4096, 10**4, 10**6  # experts of all layers
_MOST_HOLDERS, _MOST_PARAMETERS = 10**8, 10**15
_MOST_SHARDS, _MOST_TOKENS = 10**5, 10**9  # tokens of a micro-batch


def check_config(config: Config) -> None:
    """Check the rules that tie several options together.

    Raises:
        ConfigError: naming the first field, value and rule that do not hold.
    """
    check_adapters(config)
    _check_model(config)
    _check_batches(config)
    _check_sizes(config)
    _check_outer(config.outer)
    _check_data(config)
    _check_fragments(config)
    placement = build_placement(config)
    if config.router.route_scope == "resident" and config.model.ffn == "moe":
        fewest = min(placement.num_residents(site) for site in range(config.num_sites))
        if fewest < config.model.top_k:
            rule = f"needs at least top_k = {config.model.top_k} experts per layer and site; "
            raise ConfigError("router.route_scope", "resident", rule + f"a site holds {fewest}")
    _check_copies(config)
    if config.sync.average == "gradients" and not placement.full:
        rule = "needs every expert on every site (replication_factor = num_sites)"
        raise ConfigError("sync.average", "gradients", rule)
    if config.sync.average == "gradients" and config.sync.codec != "fp32":
        rule = "must be fp32 with sync.average gradients, whose errors no later sync would repair"
        raise ConfigError("sync.codec", config.sync.codec, rule)
    if config.sync.average == "gradients" and config.run.park == "always":
        raise ConfigError("run.park", "always", "has no waiting sites where gradients are averaged")


def check_ranks(config: Config, num_ranks: int, site: int | None = None) -> None:
    """Check what a site of several ranks can train.

    Args:
        site: that has them; None: all sites have as many.

    Raises:
        ConfigError: naming the field, its value and the rule.
    """
    if num_ranks == 1:
        return
    ranks, parallel, model = f"the {num_ranks} ranks of a site", config.inner.parallel, config.model
    if parallel == "none":
        raise ConfigError("inner.parallel", "none", f"must be fsdp or ddp for {ranks}")
    one = "is trained with one rank per site (--ranks-per-site 1)"
    if config.adapters.base is not None:
        raise ConfigError("adapters.base", config.adapters.base, one)
    if isinstance(config.placement, CopiesPlacement):
        raise ConfigError("placement.kind", "copies", one)
    if config.sync.average == "gradients":
        raise ConfigError("sync.average", "gradients", one)
    if parallel == "ddp" and config.sync.overlap_steps:
        rule = f"must be 0 for {ranks} with inner.parallel ddp"
        raise ConfigError("sync.overlap_steps", config.sync.overlap_steps, rule)
    if parallel == "ddp" and config.sync.fragments > 1:
        rule = f"must be 1 for {ranks} with inner.parallel ddp"
        raise ConfigError("sync.fragments", config.sync.fragments, rule)
    sizes = config.batch_sizes if site is None else config.batch_sizes[site : site + 1]
    if any(size % num_ranks for size in sizes):
        rule = f"must be a multiple of {num_ranks}: {ranks} share it equally"
        if config.inner.batch_size_by_site:
            rule = rule.replace("must be a multiple", "must have multiples")
        raise ConfigError(*_batch_option(config), rule)
    if parallel == "fsdp" and model.moe_layers:
        widths = {
            "model.d_model": (model.d_model, model.d_model),
            "model.expert_ffn_dim": (model.expert_ffn_dim, 2 * model.expert_width),
        }
        for field, (value, rows) in widths.items():
            if rows % num_ranks:
                rule = f"gives experts {rows} rows, which {ranks} cannot share equally (fsdp)"
                raise ConfigError(field, value, rule)


def _check_copies(config: Config) -> None:
    """What has no meaning where every site holds one set of copies and steps all of it."""
    if not isinstance(config.placement, CopiesPlacement):
        return
    needed = {
        "placement.store": (config.placement.store, "holders"),
        "model.ffn": (config.model.ffn, "moe"),
        "router.balance": (config.router.balance, "loss"),
        "sync.average": (config.sync.average, "parameters"),
        "sync.single_holder": (config.sync.single_holder, "outer"),
    }
    for field, (value, wanted) in needed.items():
        if value != wanted:
            raise ConfigError(field, value, f"must be {wanted} with placement.kind copies")
    if config.model.top_k > set_size(config):
        rule = f"exceeds the {set_size(config)} experts of a set of copies, which a site holds"
        raise ConfigError("model.top_k", config.model.top_k, rule)


def _check_model(config: Config) -> None:
    model = config.model
    known = config.data.fixed_vocab_size
    if model.vocab_size is None and known is None and config.adapters.base is None:
        rule = f"must be set for data.tokenizer {config.data.tokenizer}"
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


def _check_sizes(config: Config) -> None:
    """Sizes that no machine could train are refused before anything is counted or built."""
    model, d_model, layers = config.model, config.model.d_model, config.model.num_layers
    if config.num_sites > _MOST_SITES:
        raise ConfigError("num_sites", config.num_sites, f"must be at most {_MOST_SITES}")
    if layers > _MOST_LAYERS:
        raise ConfigError("model.num_layers", layers, f"must be at most {_MOST_LAYERS}")
    moe_layers = layers - model.num_dense_layers if model.ffn == "moe" else 0
    experts, most = moe_layers * model.num_experts, config.num_sites
    if config.placement.store == "holders":
        most = config.placement.most_sites(most)
    if experts > _MOST_EXPERTS or experts * most > _MOST_HOLDERS:
        rule = f"in {moe_layers} layers and on {most} sites each is more than can be planned"
        raise ConfigError("model.num_experts", model.num_experts, rule)
    heads = (model.num_heads + model.kv_heads) * model.head_size
    dense_width = model.dense_ffn_dim if model.num_dense_layers else model.active_width
    scaled = "model.expert_ffn_dim x expert_ffn_scale"
    rows = {
        "model.vocab_size": (config.vocab_size, config.vocab_size),
        "model.num_heads": (model.num_heads, layers * heads),
        scaled: (model.expert_width, (experts + layers) * model.expert_width),
        "model.shared_expert_ffn_dim": (model.shared_expert_ffn_dim,) * 2,
        "model.dense_ffn_dim": (model.dense_ffn_dim, dense_width or 0),
    }
    for field, (value, count) in rows.items():
        if count * d_model > _MOST_PARAMETERS:
            rule = f"with model.d_model {d_model} makes more than 10^15 parameters"
            raise ConfigError(field, value, rule)
    if max(config.batch_sizes) * config.data.seq_len > _MOST_TOKENS:
        rule = f"x data.seq_len {config.data.seq_len} is more than {_MOST_TOKENS} tokens at once"
        raise ConfigError(*_batch_option(config), rule)


def _batch_option(config: Config) -> tuple[str, int | list[int]]:
    """The option that says how many sequences a micro-batch has, and its value."""
    sizes = config.inner.batch_size_by_site
    if sizes is None:
        return "inner.batch_size", config.inner.batch_size
    return "inner.batch_size_by_site", list(sizes)


def _check_batches(config: Config) -> None:
    """Sites of unequal batches weigh by them; a mean of equal parts would favour the small ones."""
    sizes, sync = config.inner.batch_size_by_site, config.sync
    if sizes is None:
        return
    name, value = _batch_option(config)
    if len(sizes) != config.num_sites:
        raise ConfigError(name, value, f"must have a number for each of {config.num_sites} sites")
    if min(sizes) < 1:
        raise ConfigError(name, value, "must be at least 1 at every site")
    if config.adapters.base is not None:
        raise ConfigError(
            name, value, "must be null with adapters.base: clients' batches are equal"
        )
    if len(set(sizes)) > 1 and sync.weight == "presence" and sync.average == "parameters":
        rule = "must be tokens or uniform where inner.batch_size_by_site has different numbers"
        raise ConfigError("sync.weight", sync.weight, rule)


def _check_fragments(config: Config) -> None:
    """Fragments are cut from layers and steps without rounding, and every site syncs the same."""
    sync, number = config.sync, config.sync.fragments
    counts = {"local_steps": config.local_steps, "model.num_layers": config.model.num_layers}
    for name, count in counts.items():
        if count % number:
            both = math.gcd(*counts.values())
            fits = ", ".join(str(n) for n in range(1, both + 1) if both % n == 0)
            words = " and ".join(f"{each} {of}" for each, of in counts.items())
            rule = f"does not divide {name} {count}; these divide {words}: {fits}"
            raise ConfigError("sync.fragments", number, rule)
    excluded = {
        "sync.average gradients": config.sync.average == "gradients",
        "placement.kind copies": isinstance(config.placement, CopiesPlacement),
        "adapters.base": config.adapters.base is not None,
    }
    for what, here in excluded.items():
        if here and number > 1:
            raise ConfigError("sync.fragments", number, f"must be 1 with {what}")
        if here and sync.overlap_steps:
            raise ConfigError("sync.overlap_steps", sync.overlap_steps, f"must be 0 with {what}")
    between = config.local_steps // number
    if sync.overlap_steps and sync.overlap_steps >= between:
        rule = f"must be below the {between} local steps between two syncs"
        raise ConfigError("sync.overlap_steps", sync.overlap_steps, rule)
    if sync.mix is not None and not sync.overlap_steps:
        rule = "has no meaning without steps beside a sync (sync.overlap_steps)"
        raise ConfigError("sync.mix", sync.mix, rule)


def _check_outer(outer: OuterConfig) -> None:
    if outer.optimizer not in ELEMENTWISE_OPTIMIZERS:
        known = hint(outer.optimizer, ELEMENTWISE_OPTIMIZERS)
        rule = f"must be an elementwise class of torch.optim; {known}"
        raise ConfigError("outer.optimizer", outer.optimizer, rule)
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


def _check_clusters(config: Config) -> None:
    """Only documents of one text that all sites read are dealt by their kind."""
    data = config.data
    if data.sites is not None:
        what = "with data.sites, which says what each site reads"
    elif data.source.startswith("hf:") or data.tokenizer == "none":
        what = "with a streamed data set or token shards: their documents are not read beforehand"
    elif data.format != "text":
        what = f"with data.format {data.format}"
    else:
        return
    raise ConfigError("data.deal", "clusters", f"must be random {what}")


def _check_data(config: Config) -> None:
    data = config.data
    if data.num_shards is not None and data.num_shards < config.num_sites:
        rule = f"must be at least num_sites {config.num_sites}"
        raise ConfigError("data.num_shards", data.num_shards, rule)
    parts = data.num_shards or config.num_sites
    if parts > _MOST_SHARDS:
        raise ConfigError("data.num_shards", parts, f"must be at most {_MOST_SHARDS}")
    if data.sites is not None and len(data.sites) != parts:
        what = "parts (data.num_shards)" if data.num_shards else "sites"
        rule = f"must name one source for each of the {parts} {what}"
        raise ConfigError("data.sites", list(data.sites), rule)
    if data.deal == "clusters":
        _check_clusters(config)
    sources = [*(data.sites or (data.source,)), *([data.held_out] if data.held_out else [])]
    for source in sources:
        shards = source.endswith((".bin", ".npy"))
        if shards != (data.tokenizer == "none"):
            rule = "must be none for token shards" if shards else f"cannot read text {source}"
            raise ConfigError("data.tokenizer", data.tokenizer, rule)
    streamed = [source for source in data.sites or (data.source,) if source.startswith("hf:")]
    if streamed and data.tokenizer == "bpe":
        rule = f"is trained on text files, not on the hub data set {streamed[0]}"
        raise ConfigError("data.tokenizer", "bpe", rule)
