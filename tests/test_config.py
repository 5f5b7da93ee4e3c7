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

from fomoe.config import METHODS, Config
from fomoe.errors import ConfigError
from fomoe.load import build_config, load_config
from fomoe.methods import method_settings
from fomoe.options import option_names
from fomoe.overrides import parse_override, set_option
from fomoe.yamlfile import read_yaml


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
    "sede": "seed",
    "local-steps": "local_steps",
    "topk": "model.top_k",
    "inner.lt": "inner.lr",
    "run.dri": "run.dir",
    "inner.wieght_decay": "inner.weight_decay",
    "outer.optimiser": "outer.optimizer",
    "model.layers": "model.num_layers",
    "model.n_layers": "model.num_layers",
    "inner.batch": "inner.batch_size",
    "router.zloss": "router.z_loss",
    "run.keep": "run.keep_checkpoints",
    "model.experts.bakend": "model.experts.backend",
}
# Nothing is meant that is near: the names that the section has are said instead.
FAR = [
    *("run.carrierpigeon", "run.name", "run.resume", "run.log_dir", "model.depth", "model.dropout"),
    *("model.hidden_size", "model.norm", "inner.epochs", "inner.steps", "inner.fused", "ls"),
    *("placement.strategy", "sync.compression", "data.path", "data.shuffle", "router.jitter"),
    *("outer.damping", "foo", "epochs", "gpus"),
]


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


@pytest.mark.parametrize("name", FAR)
def test_a_name_that_is_near_to_none_gets_no_hint(tiny: Path, name: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny, [f"{name}=1"])
    section, _, _ = name.rpartition(".")
    where = f" of {section}" if section else ""
    assert str(caught.value).startswith(f"{name} is not an option{where}; choose from ")
    assert ("checkpoint_every, keep_checkpoints" in str(caught.value)) == (section == "run")


SECTIONS = [
    ("routr", "router"),
    ("outr", "outer"),
    ("mdoel", "model"),
    ("experts", "model.experts"),
]


@pytest.mark.parametrize(("name", "nearest"), SECTIONS)
def test_an_unknown_section_names_the_nearest_section(tiny: Path, name: str, nearest: str) -> None:
    with pytest.raises(ConfigError, match=rf"^{name} is not an option; did you mean {nearest}\?$"):
        load_config(tiny, [f"{name}.lr=0.1"])


def test_spaces_around_a_name_are_said() -> None:
    with pytest.raises(ConfigError, match=r"'rounds = 3' has spaces .*; did you mean rounds=3\?$"):
        parse_override("rounds = 3", Config)
    with pytest.raises(ConfigError, match=r"^' rounds' is not an option; did you mean rounds\?$"):
        build_config({" rounds": 3})


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
    ("data.source=", "data.source", "''", "must not be empty"),
    ("data.sites=a,,c", "data.sites.1", "''", "must not be empty"),
    ("data.sites=[]", "data.sites", "[]", "must name one source for each of the 3 sites"),
    ("run.dir= ", "run.dir", "' '", "must not be empty"),
    ("run.dir=a\0b", "run.dir", r"'a\x00b'", "must not hold a NUL"),
    ("data.text_field=", "data.text_field", "''", "must not be empty"),
    ("placement.capacity=[4,4,x]", "placement.capacity.2", "'x'", "must be an integer"),
    ("outer.options=[1]", "outer.options", "[1]", "must be a mapping"),
    ("model=3", "model", "3", "must be a section"),
    (
        "placement.kind=cylic",
        "placement.kind",
        "'cylic'",
        "must be one of cyclic, common, table or copies",
    ),
    (
        "placement={kind: null}",
        "placement.kind",
        "null",
        "must be one of cyclic, common, table or copies",
    ),
    (
        "placement={kind: [1]}",
        "placement.kind",
        "[1]",
        "must be one of cyclic, common, table or copies",
    ),
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
    (["data.num_shards=5", "data.sites=a,b,c"], "for each of the 5 parts (data.num_shards)"),
    (["data.source=hf:x", "data.tokenizer=bpe"], "bpe is trained on text files, not on the hub"),
    (["outer.optimizer=Muon"], "outer.optimizer Muon must be an elementwise class of torch.optim"),
    (["outer.optimizer=Adem"], "did you mean Adam?"),
    (["method=ddp", "run.park=always"], "has no waiting sites where gradients are averaged"),
    (
        ["method=diloco", "sync.average=gradients", "sync.codec=int8"],
        "sync.codec int8 must be fp32 with sync.average gradients",
    ),
    (
        ["method=ddp", "sync.codec=bf16"],
        "sync.codec bf16 contradicts method ddp, which sets 'fp32'",
    ),
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
    ("run.dir", "2026-01-02", "2026-01-02"),
    ("run.dir", "2026-13-45", "2026-13-45"),
    ("run.dir", "null", None),
    ("data.held_out", "null", None),
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


WORDS = [
    "100",
    "1e3",
    "true",
    "~",
    "p #2",
    "*x",
    "@x",
    "[x]",
    "a: b",
    "'q'",
    "- x",
    "%",
    "x,y",
    "\ud7ff",
]


@pytest.mark.parametrize("text", WORDS)
@pytest.mark.parametrize("name", ["data.source", "data.text_field", "data.held_out", "run.dir"])
def test_an_override_of_text_is_taken_word_by_word(tiny: Path, name: str, text: str) -> None:
    config = load_config(tiny, [f"{name}={text}"])
    assert option(config, name) == text
    assert build_config(yaml.safe_load(config.to_yaml())) == config  # and survives a file


LISTS = {
    "[a.txt,b.txt,c.txt]": ("a.txt", "b.txt", "c.txt"),
    "a.txt, *.txt ,@f #2.txt": ("a.txt", "*.txt", "@f #2.txt"),
    "[1, null, 2026-01-02]": ("1", "null", "2026-01-02"),
    "['a, b', \"c\\\"d\", it's]": ("a, b", 'c"d', "it's"),
    "[a].txt,[b-c].txt,[d]": ("[a].txt", "[b-c].txt", "[d]"),
    "[[a].txt,b,[c]]": ("[a].txt", "b", "[c]"),
    "~/a,'b' c,d": ("~/a", "'b' c", "d"),
}


@pytest.mark.parametrize(("text", "expected"), LISTS.items())
def test_an_override_of_a_list_of_texts(tiny: Path, text: str, expected: tuple[str, ...]) -> None:
    assert load_config(tiny, [f"data.sites={text}"]).data.sites == expected
    assert load_config(tiny, ["data.sites=null"]).data.sites is None


@pytest.mark.parametrize(
    ("word", "shown"), [("100", "100"), ("1.5", "1.5"), ("true", "true"), ("-3", "-3")]
)
def test_a_file_says_what_to_quote(tmp_path: Path, word: str, shown: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, f"run: {{dir: {word}}}"))
    assert str(caught.value) == (
        f"run.dir {shown} must be text; in a file it needs quotes, as in '{shown}'"
    )
    tree = tiny_tree(tmp_path) | {"run": {"dir": "WORD"}}
    text = yaml.safe_dump(tree).replace("WORD", f"'{word}'")
    assert load_config(write(tmp_path, text)).run.dir == word


# --------------------------------------------------------------------------------------- YAML files


def test_merge_keys_are_read_and_overridden(tmp_path: Path) -> None:
    """Also a base that has a base of its own, whichever of them is built first."""
    text = """
    outer:
      options: &more {<<: &base {a: 1, b: 2}, b: 3}
    inner: {<<: {lr: 0.1, beta1: 0.5}, lr: 0.2}
    """
    tree = read_yaml(write(tmp_path, text))
    assert tree["outer"]["options"] == {"a": 1, "b": 3}
    assert tree["inner"] == {"lr": 0.2, "beta1": 0.5}
    text = """
    a: {deep: {deeper: &b {<<: &c {x: 1, y: 2}, x: 3}}}
    d: {<<: *b, z: 5}
    e: {<<: [*b, *c, {w: 0}]}
    """
    tree = read_yaml(write(tmp_path, text))
    assert tree["a"]["deep"]["deeper"] == {"x": 3, "y": 2}
    assert tree["d"] == {"x": 3, "y": 2, "z": 5}
    assert tree["e"] == {"x": 3, "y": 2, "w": 0}  # the first that has a key decides


WRONG_YAML = [
    ("inner:\n  lr: 0.1\n  lr: 0.2\n", "key 'lr' appears twice", "line 3"),
    ("inner: {<<: {lr: 1}, <<: {lr: 2}}", "key '<<' appears twice", "line 1"),
    ("inner: {<<: 3}", "<< must name a mapping", "line 1"),
    ("inner: {<<: [{lr: 1}, 3]}", "<< must name a mapping, or a list", "line 1"),
    ("outer: {options: &it {a: *it}}", "*it contains itself", "line 1"),
    ("outer: {options: {a: &it [1, [*it]]}}", "*it contains itself", "line 1"),
    ("&it\nmodel: *it", "*it contains itself", "line 2"),
    ("1: 2", "key 1 must be text", "line 1"),
    ("? [a]\n: 2", "key that is not a word must be text", "line 1"),
    ("a: *b", "undefined alias", "line 1"),
    ("rounds: !!timestamp x", "could not determine a constructor", "line 1"),
    ("rounds: !!int x", "invalid literal", "'x'"),
    ("rounds: " + "9" * 5000, "digits", "limit"),
    ("rounds: " + "[" * 3000, "nested too deeply", ""),
    ("rounds: 3\n---\nrounds: 4\n", "expected a single document", "line 2"),
]


@pytest.mark.parametrize(("text", "what", "where"), WRONG_YAML, ids=[w[1] for w in WRONG_YAML])
def test_a_file_that_is_no_yaml_of_options(
    tmp_path: Path, text: str, what: str, where: str
) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(write(tmp_path, text))
    assert "is not valid YAML: " in str(caught.value)
    assert what in str(caught.value)
    assert where in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("encoding", ["utf-8-sig", "utf-16"])
def test_a_file_in_another_encoding(tmp_path: Path, encoding: str) -> None:
    path = write_config(tmp_path)
    path.write_bytes((path.read_text() + "# ü\n").encode(encoding))
    assert load_config(path).num_sites == 3


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
        *(["placement.replication_factor=1", "model.num_experts=6"] if method == "copies" else []),
    ]
    config = load_config(write_config(tmp_path), overrides)
    again = load_config(write(tmp_path, config.to_yaml()))
    assert again == config
    assert again.fingerprint() == config.fingerprint()
    assert build_config(config.model_dump(mode="json")) == config


@pytest.mark.parametrize("method", METHODS)
def test_a_method_sets_what_it_says(tiny: Path, method: str) -> None:
    sets = ["num_sites=4"] if method == "copies" else []  # of 3 sites no set can be at 2
    config = load_config(tiny, [f"method={method}", *sets])
    for name, value in method_settings(config).items():
        read = option(config, name)
        if isinstance(value, dict) and value:  # a whole section: what it leaves out is the default
            read, value = read.model_dump(), type(read)(**value).model_dump()
        assert read == value, name
    r = config.placement.replication_factor
    num_sites = {"single": 1, "copies": 4}.get(method, 3)
    assert (config.num_sites, r) == (num_sites, 1 if method == "single" else r)
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
    ("single", "placement.replication_factor=2", "1"),
    ("diloco", "placement.capacity=[4,4,4]", "null"),
    ("diloco", "placement.num_common=1", "null"),
    ("diloco", "placement.store=all", "'holders'"),
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


WITHIN = [
    ("diloco", "placement={kind: common, num_common: 3}"),
    ("diloco", "placement={kind: cyclic, replication_factor: 3, num_common: 3}"),
    ("photon", "outer.options={weight_decay: 0.1}"),
    ("photon", "outer.options.weight_decay=0.1"),
]


@pytest.mark.parametrize(("method", "override"), WITHIN)
def test_no_part_of_a_section_that_contradicts_is_dropped_in_silence(
    tiny: Path, method: str, override: str
) -> None:
    with pytest.raises(ConfigError, match=f"contradicts method {method}, which sets"):
        load_config(tiny, [f"method={method}", override])


def test_an_override_that_agrees_with_the_method_is_taken(tiny: Path) -> None:
    plain = load_config(tiny, ["method=photon"])
    for words in (
        ["outer.lr=1", "placement.replication_factor=3"],
        ["outer={lr: 1}", "placement={kind: cyclic, replication_factor: 3, num_common: null}"],
        ["placement.replication_factor=2", "placement={replication_factor: 3}"],
    ):
        assert load_config(tiny, ["method=photon", *words]) == plain


def test_only_what_a_method_sets_can_contradict_it(tiny: Path) -> None:
    """A nan equals nothing, itself included."""
    assert load_config(tiny, ["outer.options={a: .nan}"]).outer.options


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


def test_a_path_is_named_whole_and_another_long_value_is_cut(tmp_path: Path) -> None:
    missing = tmp_path / ("deep" * 30) / "no.yaml"
    outcome = fomoe("train", missing)
    assert (outcome.status, outcome.out) == (2, "")
    assert f"config {missing} does not exist" in outcome.err
    assert str(ConfigError("method", "x" * 90, "is none")) == f"method {'x' * 77}... is none"
