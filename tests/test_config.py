"""Options: what is read, what is refused, and what a method's name sets."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from helpers_cli import fomoe, tiny_tree, write_config
from pydantic import ValidationError

from fomoe.config import METHODS, Config, build_config, load_config
from fomoe.errors import ConfigError
from fomoe.methods import method_settings
from fomoe.options import option_names
from fomoe.overrides import parse_override, set_option


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    return write_config(tmp_path)


def write(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "given.yaml"
    path.write_text(text)
    return path


def option(config: Config, name: str) -> Any:
    value: Any = config
    for part in name.split("."):
        value = value[part] if isinstance(value, dict) else getattr(value, part)
    return value


# ------------------------------------------------------------------------------------ unknown keys

MISSPELLED = {
    "local_step": "local_steps",
    "lr": "inner.lr",
    "replication_factor": "placement.replication_factor",
    "placement.replication": "placement.replication_factor",
    "model.num_expert": "model.num_experts",
    "inner.nesterov": "outer.nesterov",
    "sync.weights": "sync.weight",
    "run.checkpoint_evry": "run.checkpoint_every",
    "data.seqlen": "data.seq_len",
}


@pytest.mark.parametrize(("name", "nearest"), MISSPELLED.items())
@pytest.mark.parametrize("where", ["file", "override"])
def test_an_unknown_key_names_the_nearest(
    tmp_path: Path, name: str, nearest: str, where: str
) -> None:
    tree, overrides = tiny_tree(tmp_path), [f"{name}=1"]
    if where == "file":
        set_option(tree, name, 1)
        overrides = []
    path = write(tmp_path, yaml.safe_dump(tree))
    with pytest.raises(ConfigError) as caught:
        load_config(path, overrides)
    assert str(caught.value) == f"{name} is not an option; did you mean {nearest}?"
    assert nearest in option_names(Config)


@pytest.mark.parametrize(("name", "nearest"), [("routr", "router"), ("outr", "outer")])
def test_an_unknown_section_names_the_nearest_section(tiny: Path, name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not an option; did you mean {nearest}\?$"):
        load_config(tiny, [f"{name}.lr=0.1"])


# ------------------------------------------------------------------------------------ wrong values

WRONG = [
    ("rounds=3.0", "rounds", "3.0", "must be an integer"),
    ("rounds=true", "rounds", "true", "must be an integer"),
    ("rounds='3'", "rounds", "'3'", "must be an integer"),
    ("rounds=", "rounds", "null", "must be an integer"),
    ("rounds=0", "rounds", "0", "must be at least 1"),
    ("seed=-1", "seed", "-1", "must be at least 0"),
    ("inner.lr='3e-4'", "inner.lr", "'3e-4'", "must be a number"),
    ("inner.lr=0", "inner.lr", "0", "must be greater than 0"),
    ("inner.lr=.nan", "inner.lr", "nan", "must be a finite number"),
    ("outer.lr=.inf", "outer.lr", "inf", "must be a finite number"),
    ("router.execute_target=1.5", "router.execute_target", "1.5", "must be at most 1"),
    ("model.tie_embeddings=yes", "model.tie_embeddings", "'yes'", "must be true or false"),
    ("model.tie_embeddings=1", "model.tie_embeddings", "1", "must be true or false"),
    ("model.qk_norm=heads", "model.qk_norm", "'heads'", "must be one of none, head or full"),
    ("data.source=3", "data.source", "3", "must be text"),
    ("data.sites=a.txt", "data.sites", "'a.txt'", "must be a list"),
    ("placement.capacity=[4,4,x]", "placement.capacity.2", "'x'", "must be an integer"),
    ("outer.options=[1]", "outer.options", "[1]", "must be a mapping"),
    ("model=3", "model", "3", "must be a section"),
    ("rounds.x=1", "rounds.x", "1", "rounds is not a section"),
    ("inner.beta1=1.0", "inner.beta1", "1.0", "must be less than 1"),
]


@pytest.mark.parametrize(("override", "field", "value", "rule"), WRONG, ids=[w[0] for w in WRONG])
def test_a_wrong_value_names_field_value_and_rule(
    tiny: Path, override: str, field: str, value: str, rule: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, [override])
    assert str(caught.value).startswith(f"{field} {value} ")
    assert rule in str(caught.value)


RULES = [
    (["placement.replication_factor=4"], "replication_factor 4 exceeds the 3 sites"),
    (["model.top_k=5"], "model.top_k 5 exceeds the 4 experts"),
    (
        ["placement.replication_factor=null", "placement.capacity=[1,1,1]"],
        "leaves an expert of 4 without a holder",
    ),
    (["placement.capacity=[3,2,2]"], "need 8"),
    (["placement.capacity=[4,4]"], "one number for each of the 3 sites"),
    (["placement.kind=common"], "has no meaning for common placement"),
    (["placement.kind=table", "placement.replication_factor=null"], "must be set for table"),
    (
        [
            "placement.kind=table",
            "placement.replication_factor=null",
            "placement.table=[[0],[1],[],[2]]",
        ],
        "expert 2: [] leaves the expert without a holder",
    ),
    (["model.num_heads=3"], "model.num_heads 3 does not divide d_model 16"),
    (["model.num_kv_heads=3"], "model.num_kv_heads 3 does not divide num_heads 2"),
    (["model.vocab_size=256"], "model.vocab_size 256 is below the tokenizer's 257 tokens"),
    (["data.tokenizer=bpe", "model.vocab_size=512"], "below the tokenizer's 4096"),
    (["data.tokenizer=none", "model.vocab_size=9"], "cannot read text"),
    (["data.source=x.bin"], "must be none for token shards"),
    (["data.sites=[a.txt,b.txt]"], "one source for each of the 3 sites"),
    (["data.num_shards=2"], "must be at least num_sites 3"),
    (["sync.average=gradients"], "needs every expert on every site"),
    (["router.route_scope=resident", "model.top_k=4"], "needs at least top_k = 4"),
    (["outer.optimizer=Adam", "outer.momentum=0.9"], "is an option of SGD, not of Adam"),
    (["outer.options.lr=0.1"], "is set by outer.lr"),
    (["outer.nesterov=true", "outer.momentum=0"], "needs outer.momentum above 0"),
]


@pytest.mark.parametrize(("overrides", "message"), RULES, ids=[m for _, m in RULES])
def test_a_broken_rule_between_options(tiny: Path, overrides: list[str], message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, overrides)
    assert message in str(caught.value)


# -------------------------------------------------------------------------------- words and numbers

READ = [
    ("inner.lr", "3e-4", 3e-4),
    ("inner.lr", "1E-3", 1e-3),
    ("inner.lr", ".5", 0.5),
    ("inner.lr", "1", 1.0),
    ("run.wandb", "off", "off"),
    ("model.tie_embeddings", "true", True),
    ("router.execute_target", "null", None),
    ("outer.options.weight_decay", "1e-2", 1e-2),
    ("placement.capacity", "[4, 4, 4]", (4, 4, 4)),
    ("data.source", "on", "on"),
    ("run.dir", "a=b", "a=b"),
]


@pytest.mark.parametrize(("name", "text", "value"), READ, ids=[f"{r[0]}={r[1]}" for r in READ])
@pytest.mark.parametrize("where", ["file", "override"])
def test_words_and_numbers_as_people_mean_them(
    tmp_path: Path, name: str, text: str, value: object, where: str
) -> None:
    if where == "override":
        config = load_config(write_config(tmp_path), [f"{name}={text}"])
    else:
        tree = tiny_tree(tmp_path)
        set_option(tree, name, "VALUE")  # replaced by the word itself, unquoted
        config = load_config(write(tmp_path, yaml.safe_dump(tree).replace("VALUE", text)))
    read = option(config, name)
    assert read == value
    assert type(read) is type(value)


def test_a_key_that_stands_twice_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="'lr' stands twice"):
        load_config(write(tmp_path, "inner:\n  lr: 0.1\n  lr: 0.2\n"))


@pytest.mark.parametrize("override", ["rounds", "=3", ""])
def test_an_override_needs_a_name_and_a_value(override: str) -> None:
    with pytest.raises(ConfigError, match=r"must have the form section\.option=value"):
        parse_override(override, Config)


def test_overrides_win_over_the_file_and_the_last_one_wins(tiny: Path) -> None:
    config = load_config(tiny, ["rounds=5", "outer.lr=0.1", "rounds=6"])
    assert (config.rounds, config.outer.lr, config.local_steps) == (6, 0.1, 2)


def test_overrides_may_follow_flags(tiny: Path) -> None:
    for words in (
        ["rounds=7", "--dry-run", "--json"],
        ["--dry-run", "rounds=7", "--json"],
        ["--dry-run", "--json", "rounds=7"],
        ["--dry-run", "local_steps=3", "--json", "rounds=7"],
    ):
        outcome = fomoe("train", tiny, *words)
        assert outcome.status == 0, outcome.err
        assert outcome.json["rounds"] == 7
        assert outcome.json["local_steps"] == (3 if "local_steps=3" in words else 2)


# ----------------------------------------------------------------------------------- the whole tree


def test_the_tree_is_frozen(tiny: Path) -> None:
    config = load_config(tiny)
    with pytest.raises(ValidationError, match="frozen"):
        config.rounds = 3  # type: ignore[misc]
    with pytest.raises(ValidationError, match="frozen"):
        config.inner.lr = 3.0  # type: ignore[misc]


@pytest.mark.parametrize("method", METHODS)
def test_the_resolved_config_reloads_equal(tmp_path: Path, method: str) -> None:
    """Also: a method's settings do nothing to a config that has them."""
    overrides = [
        f"method={method}",
        "outer.options={weight_decay: 0.01}" if method in ("fomoe", "ddp") else "seed=3",
        "data.num_shards=5",
        "run.wandb=offline",
    ]
    config = load_config(write_config(tmp_path), overrides)
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert build_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_it_says(tiny: Path, method: str) -> None:
    config = load_config(tiny, [f"method={method}"])
    for name, value in method_settings(config).items():
        read = option(config, name)
        assert (list(read) if isinstance(read, tuple) else read) == value, name
    r = config.placement.replication_factor
    assert (config.num_sites, r) == ((1, 1) if method == "single" else (3, r))
    if method in ("diloco", "photon", "ddp", "dense", "diloco-half"):
        assert r == 3
    elif method != "single":
        assert r == 2


CONTRADICTIONS = [
    ("diloco", "placement.replication_factor=2", "3"),
    ("diloco", "placement.kind=common", "'cyclic'"),
    ("photon", "outer.lr=0.7", "1.0"),
    ("photon", "outer.momentum=0.9", "0.0"),
    ("ddp", "sync.average=parameters", "'gradients'"),
    ("spes", "placement.store=holders", "'all'"),
    ("resident-routing", "router.route_scope=all", "'resident'"),
    ("dense", "model.ffn=moe", "'dense'"),
    ("diloco-half", "model.expert_ffn_scale=1.0", "0.5"),
    ("single", "num_sites=3", "1"),
]


@pytest.mark.parametrize(("method", "override", "sets"), CONTRADICTIONS)
def test_an_override_that_contradicts_the_method_is_refused(
    tiny: Path, method: str, override: str, sets: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, [f"method={method}", override])
    field = override.partition("=")[0]
    assert str(caught.value).startswith(f"{field} ")
    assert f"contradicts method {method}, which sets {sets}" in str(caught.value)


def test_an_override_that_agrees_with_the_method_is_taken(tiny: Path) -> None:
    config = load_config(tiny, ["method=photon", "outer.lr=1", "placement.replication_factor=3"])
    assert config == load_config(tiny, ["method=photon"])


def test_the_fingerprint_covers_every_option_but_run(tiny: Path) -> None:
    config = load_config(tiny)
    same = [["run.dir=elsewhere"], ["run.log_every=99"], ["run.wandb=offline"]]
    for overrides in same:
        assert load_config(tiny, overrides).fingerprint() == config.fingerprint()
    other = [["seed=1"], ["outer.lr=0.6"], ["data.seq_len=17"], ["rounds=3"], ["method=spes"]]
    hashes = {load_config(tiny, overrides).fingerprint() for overrides in other}
    assert len(hashes | {config.fingerprint()}) == len(other) + 1


# ------------------------------------------------------------------------------------ a light start


@pytest.mark.parametrize(
    "code",
    [
        "import fomoe",
        "from fomoe.cli import main; main(['--help'])",
        "from fomoe.cli import main; main(['train', CONFIG, '--dry-run'])",
        "from fomoe.cli import main; main(['train', CONFIG, '--dry-run', '--json'])",
        "from fomoe.cli import main; main(['train', CONFIG, 'model.top_k=9'])",
    ],
)
def test_no_torch_before_it_is_needed(tiny: Path, code: str) -> None:
    script = (
        f"import sys\nCONFIG = {str(tiny)!r}\ntry:\n    {code}\nexcept SystemExit:\n    pass\n"
        "heavy = {'torch', 'wandb', 'datasets', 'transformers', 'tokenizers'} & set(sys.modules)\n"
        "sys.stderr.write(f'heavy={sorted(heavy)}')\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    assert done.stderr.endswith("heavy=[]")
