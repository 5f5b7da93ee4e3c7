"""Export to transformers' formats, and what starts from an exported model or from a run."""

from __future__ import annotations

import json
import math
import re
import shutil
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import all_good, make_run, over_gloo, tiny_config, whole_model
from helpers_cli import fomoe, snapshot, trained, words, write_config, write_texts
from safetensors.torch import load_file, save_file

from fomoe import generate as fomoe_generate
from fomoe.build import check_equal_start
from fomoe.checkpoint import round_folder
from fomoe.data.tokenizer import ByteTokenizer, load_tokenizer, parse_bpe
from fomoe.errors import SiteMismatchError
from fomoe.exporting import export
from fomoe.formats import FORMATS, choose_format, why_not
from fomoe.load import build_config, load_config
from fomoe.model.transformer import Transformer
from fomoe.overrides import parse_override, set_option
from fomoe.whole import WholeModel, open_whole
from fomoe.yamlfile import read_yaml

# The tiny experiment in every format, with whatever of it the format can say.
SETTINGS: dict[str, list[str]] = {
    "olmoe": ["model.qk_norm=full", "model.shared_expert_ffn_dim=0", "router.skip_scale=inverse"],
    "qwen3_moe": [
        *("model.qk_norm=head", "model.shared_expert_ffn_dim=0", "model.head_dim=12"),
        *("model.num_layers=3", "model.num_dense_layers=1", "model.tie_embeddings=true"),
        "router.gate_norm=none",
    ],
    "mixtral": [
        *("model.shared_expert_ffn_dim=0", "model.num_heads=4", "model.num_kv_heads=2"),
        "router.gate_norm=survivors",
    ],
    "ernie4_5_moe": [
        *("model.shared_expert_ffn_dim=32", "model.head_dim=12", "model.num_kv_heads=1"),
        *("model.num_layers=3", "model.num_dense_layers=1", "model.dense_ffn_dim=20"),
        *("router.balance=both", "router.bias_rate=0.2", "sync.router_rows=holders"),
    ],
    "glm4_moe": [
        *("model.qk_norm=head", "model.shared_expert_ffn_dim=16", "router.score=sigmoid"),
        *("model.num_layers=3", "model.num_dense_layers=1", "model.num_kv_heads=1"),
        *("router.balance=bias", "router.bias_rate=0.2", "router.skip_scale=inverse"),
    ],
}
UNUSUAL = ["model.rope_theta=500", "model.norm_eps=1e-6", "model.init_std=0.1"]


@pytest.fixture(scope="session", params=list(SETTINGS))
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A trained run whose model one format can say; tests do not change it."""
    folder = tmp_path_factory.mktemp(request.param)
    run = folder / request.param
    config = write_config(folder)
    trained(config, *SETTINGS[request.param], *UNUSUAL, "rounds=3", f"run.dir={run}")
    return run


@pytest.fixture(scope="session")
def glm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One run for the tests to which the format does not matter, r = 1; they do not change it."""
    folder = tmp_path_factory.mktemp("glm")
    options = ["placement.replication_factor=1", "num_sites=4", f"run.dir={folder / 'run'}"]
    trained(
        write_config(folder), *SETTINGS["glm4_moe"], *options, "rounds=3", "run.eval_merged_every=1"
    )
    return folder / "run"


def again(run: Path) -> list[str]:
    """The command line of a run that starts from this one, or from its export."""
    return [str(run.parent / "tiny.yaml"), *SETTINGS.get(run.name, SETTINGS["glm4_moe"])]


def our_model(run: Path) -> Transformer:
    """The merged model in memory."""
    whole = open_whole(run, None)
    tensors = {name: whole.read(name) for name in whole.shapes}
    biases = {name: tensors.pop(name) for name in list(tensors) if name.endswith("balance_bias")}
    assert all(bias.any() for bias in biases.values())
    model = whole_model(whole.config, tensors)
    for name, bias in biases.items():
        model.moe(int(name.split(".")[1])).router.balance_bias_E.copy_(bias)
    return model.eval()


@torch.no_grad()
def our_logits(model: Transformer, tokens_BS: torch.Tensor) -> torch.Tensor:
    x_BSD = model.embed(tokens_BS)
    for layer in range(len(model.layers)):
        x_BSD = model.run_layer(layer, x_BSD)[0]
    return model.logits(x_BSD)


def some_text() -> str:
    return words(100, 77) + "é – 漢字\n"


# ------------------------------------------------------------------------- what transformers loads


def test_transformers_computes_the_same_logits(run: Path, tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    outcome = fomoe("export", run, "--out", tmp_path / "out")
    assert outcome.status == 0, outcome.err
    assert f"exported round 3 as {run.name}" in outcome.err
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info.values()), info
    assert type(theirs).__name__ == FORMATS[run.name].architecture
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    tokens = tokenizer(some_text(), add_special_tokens=False)["input_ids"]
    assert tokens == ByteTokenizer().encode(some_text()).tolist()
    assert tokenizer.decode(tokens) == some_text()
    assert tokenizer.eos_token_id == theirs.config.eos_token_id == 256
    tokens_BS = torch.tensor(tokens[:64]).view(4, 16)
    with torch.no_grad():
        logits = theirs(input_ids=tokens_BS).logits
    assert logits.std() > 0.1
    torch.testing.assert_close(logits, our_logits(our_model(run), tokens_BS), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bf16", "fp16"])
def test_a_narrow_type_in_several_files(glm: Path, tmp_path: Path, dtype: str) -> None:
    transformers = pytest.importorskip("transformers")
    export(glm, tmp_path / "out", dtype=dtype, shard_bytes=4000)
    files = json.loads((tmp_path / "out/model.safetensors.index.json").read_bytes())["weight_map"]
    assert len(set(files.values())) > 3
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert model.lm_head.weight.dtype == {"bf16": torch.bfloat16, "fp16": torch.float16}[dtype]
    tokens_BS = torch.arange(16)[None]
    logits = model(input_ids=tokens_BS).logits.float()
    torch.testing.assert_close(logits, our_logits(our_model(glm), tokens_BS), rtol=0, atol=0.1)


def test_the_folder_one_stands_in(
    glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    empty = tmp_path / "empty"
    empty.mkdir()
    monkeypatch.chdir(empty)
    assert fomoe("export", glm, "--out", ".").status == 0
    assert (empty / "model.safetensors").exists()
    assert list(tmp_path.iterdir()) == [empty]


def test_one_holder_each_gives_the_merged_model(glm: Path, tmp_path: Path) -> None:
    """r = 1 of 4 sites: no site holds more than a quarter of the experts that are exported."""
    transformers = pytest.importorskip("transformers")
    assert fomoe("merge", glm, "--out", tmp_path / "merged").status == 0
    assert fomoe("export", glm, "--out", tmp_path / "out").status == 0
    merged = load_file(tmp_path / "merged/model.safetensors")
    theirs = load_file(tmp_path / "out/model.safetensors")
    for expert in range(4):
        for layer in (1, 2):
            ours = f"layers.{layer}.moe.experts.{expert}"
            block = f"model.layers.{layer}.mlp.experts.{expert}"
            pair = [theirs[f"{block}.{part}_proj.weight"] for part in ("gate", "up")]
            assert torch.equal(torch.cat(pair), merged[f"{ours}.gate_up"])
            assert torch.equal(theirs[f"{block}.down_proj.weight"], merged[f"{ours}.down"])
    data = np.frombuffer(b"".join(p.read_bytes() for p in texts(glm)), np.uint8)[:160]
    tokens_BS = torch.tensor(data.reshape(10, 16).astype(np.int64))
    model = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    with torch.no_grad():
        loss = float(model(input_ids=tokens_BS, labels=tokens_BS).loss)
    logits = our_logits(our_model(glm), tokens_BS)[:, :-1].flatten(0, 1)
    own = float(torch.nn.functional.cross_entropy(logits, tokens_BS[:, 1:].flatten()))
    assert loss == pytest.approx(own, abs=1e-5)


def texts(run: Path) -> list[Path]:
    return sorted((run.parent / "texts").glob("*.txt"))


def test_a_trained_tokenizer_is_exported(tmp_path: Path) -> None:
    transformers = pytest.importorskip("transformers")
    options = ["data.tokenizer=bpe", "data.bpe_vocab_size=300", "model.vocab_size=320"]
    trained(write_config(tmp_path), *SETTINGS["mixtral"], *options, "rounds=1")
    assert fomoe("export", tmp_path / "run", "--out", tmp_path / "out").status == 0
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    ours = parse_bpe((tmp_path / "run/tokenizer.json").read_bytes())
    tokens = tokenizer(some_text(), add_special_tokens=False)["input_ids"]
    assert tokens == ours.encode(some_text()).tolist()
    assert tokenizer.decode(tokens) == some_text()
    assert tokenizer.eos_token_id == ours.eos_id
    assert load_tokenizer(str(tmp_path / "out")).fingerprint == ours.fingerprint
    # Halves of a letter count as their bytes.
    assert sum(ours.num_bytes(np.array([token])) for token in tokens) == len(some_text().encode())


def test_one_tensor_is_in_memory_at_a_time(
    glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, alive, most = WholeModel.read, list[Any](), 0

    def read(whole: WholeModel, name: str) -> torch.Tensor:
        nonlocal most
        tensor = kept(whole, name)
        alive.append(weakref.ref(tensor))
        most = max(most, sum(own() is not None for own in alive))
        return tensor

    monkeypatch.setattr(WholeModel, "read", read)
    export(glm, tmp_path / "out")
    assert len(alive) > 50
    assert most <= 2


def test_the_card_has_the_facts(glm: Path, tmp_path: Path) -> None:
    summary = json.loads((glm / "summary.json").read_bytes())
    for number in (2, 3):
        fomoe("export", glm, "--round", number, "--out", tmp_path / str(number))
    card = (tmp_path / "3/README.md").read_text()
    assert f"| merged validation loss | {summary['val_loss_merged']:.4f} nats" in card
    assert f"| parameters | {summary['params_total']:,}," in card
    assert f"| tokens, all sites | {summary['tokens']:,} |" in card
    assert "| sites | 4 |" in card
    earlier = (tmp_path / "2/README.md").read_text()
    assert "| rounds of local steps | 2 of 2 |" in earlier
    assert f"{summary['val_loss_merged']:.4f}" not in earlier
    assert re.search(r"merged validation loss \| \d\.\d{4} nats", earlier)


# --------------------------------------------------------------------------- what a format can say


def tree_of(options: list[str]) -> dict[str, Any]:
    tree: dict[str, Any] = {
        "data": {"source": "text.txt"},
        "placement": {"replication_factor": 2},
        "model": {"expert_ffn_dim": 16},
    }
    for option in options:
        set_option(tree, *parse_override(option, type(tiny_config())))
    return tree


@pytest.mark.parametrize("name", list(FORMATS))
@pytest.mark.parametrize(
    "options",
    [
        *SETTINGS.values(),
        ["model.ffn=dense"],
        ["model.num_dense_layers=2", "model.ffn=dense", "model.dense_ffn_dim=100"],
        ["model.num_dense_layers=2", "model.dense_ffn_dim=100", "model.num_experts=1"],
        ["model.head_dim=10", "router.gate_norm=none", "router.score=sigmoid"],
        ["model.shared_expert_ffn_dim=100", "router.balance=bias"],
    ],
)
def test_every_reason_names_the_setting_that_would_allow_it(name: str, options: list[str]) -> None:
    options = [*options] if "model.num_experts=1" not in options else [*options, "model.top_k=1"]
    reasons = why_not(build_config(tree_of(options)), name)
    found = [re.search(r"\(([a-z._0-9]+=[a-z0-9]+)[ )]", reason) for reason in reasons]
    changed = options + [match[1] for match in found if match]
    assert len(changed) == len(options) + len(reasons)
    rest = why_not(build_config(tree_of(changed)), name)
    if "model.ffn=moe" in changed and rest:  # experts bring settings of their own
        changed += [m[1] for r in rest if (m := re.search(r"\(([a-z._0-9]+=[a-z0-9]+)[ )]", r))]
        rest = why_not(build_config(tree_of(changed)), name)
    assert not rest


def test_every_config_of_the_project_has_a_format() -> None:
    for path in Path(__file__).parent.parent.glob("configs/*.yaml"):
        # Adapters bring no model of their own; capacity keeps the norms of its published figures.
        if "adapters" in read_yaml(path) or path.name == "capacity.yaml":
            continue
        assert choose_format(load_config(path), None) in FORMATS, path


def test_the_format_is_chosen_by_what_the_model_needs() -> None:
    for name, options in SETTINGS.items():
        assert choose_format(build_config(tree_of(options)), None) == name


# ---------------------------------------------------------------------------------- starting again


@pytest.mark.parametrize("source", ["run", "export", "saved by transformers"])
def test_export_and_start_and_export_is_bitwise(run: Path, tmp_path: Path, source: str) -> None:
    """With another placement; an outer learning rate of 0 leaves what the sites started from."""
    export(run, tmp_path / "first")
    start = run if source == "run" else tmp_path / "first"
    if source == "saved by transformers":
        transformers = pytest.importorskip("transformers")
        model = transformers.AutoModelForCausalLM.from_pretrained(start)
        start = tmp_path / "start"
        model.save_pretrained(start)
    trained(
        *again(run),
        *UNUSUAL,
        *("rounds=1", "num_sites=2", "placement.replication_factor=1", "sync.router_rows=all"),
        *("outer.lr=0", "router.bias_rate=1e-30"),
        *(f"init_from={start}", f"run.dir={tmp_path / 'run'}"),
    )
    export(tmp_path / "run", tmp_path / "second")
    for name in ("model.safetensors", "tokenizer.json", "generation_config.json"):
        assert (tmp_path / "first" / name).read_bytes() == (tmp_path / "second" / name).read_bytes()


def test_a_site_reads_its_own_experts_only(glm: Path, tmp_path: Path) -> None:
    config = json_config(glm, init_from=str(glm))
    read: list[str] = []
    from fomoe.initial import open_initial

    initial = open_initial(config, None)
    assert initial is not None
    site = make_run(config).sites[1]
    site.start_from(lambda name: read.append(name) or initial.read(name), initial.biases)
    experts = {name for name in read if "experts." in name}
    assert experts == {s.name for s in site.segments if s.is_expert}
    assert 0 < len(experts) < 16


def json_config(run: Path, **changes: Any) -> Any:
    return open_whole(run, None).config.model_copy(update=changes)


def test_a_resume_needs_the_folder_no_more(glm: Path, tmp_path: Path) -> None:
    export(glm, tmp_path / "start")
    line = [*again(glm), f"init_from={tmp_path / 'start'}", f"run.dir={tmp_path / 'run'}"]
    summary = json.loads((glm / "summary.json").read_bytes())
    # Its third round is as good as done.
    assert trained(*line, "rounds=1")["val_loss_merged"] < summary["val_loss_merged"]
    (tmp_path / "start").rename(tmp_path / "moved")
    trained(*line, "--resume", "rounds=2")
    outcome = fomoe("train", *line, "--overwrite")
    assert outcome.status == 2
    assert outcome.err.endswith("start does not exist\n")
    outcome = fomoe("train", *again(glm), "--resume", f"run.dir={tmp_path / 'run'}")
    assert "init_from (was " in outcome.err


def test_sites_that_start_from_different_files_are_refused(tmp_path: Path) -> None:
    config = tiny_config(num_sites=2, init_from="model")

    def work(transport: Any) -> None:
        run = make_run(config, transport)
        (site,) = run.sites.values()
        start = Transformer(config, {layer: tuple(range(8)) for layer in config.model.moe_layers})
        values = dict(start.named_parameters())
        if site.site:
            with torch.no_grad():
                values["final_norm.weight"] += 1

        def read(name: str) -> torch.Tensor:
            stack, _, part = name.rpartition(".")
            if ".experts." in name:
                stack, _, expert = stack.rpartition(".")
                return values[f"{stack}.{part}"][int(expert)]
            return values[name]

        site.start_from(read, ())
        check_equal_start(config, run.sync)

    for error in over_gloo(2, work):
        assert isinstance(error, SiteMismatchError)
        assert str(error) == "init_from model is not the same model at all sites"
    all_good([])


# ----------------------------------------------------------------------------------------- refusals

WRONG_STARTS = {
    "other vocabulary": (["model.vocab_size=300"], "vocab_size"),
    "other width": (
        ["model.expert_ffn_dim=12", "model.shared_expert_ffn_dim=12"],
        "expert_ffn_dim",
    ),
    "other theta": (["model.rope_theta=700"], "rope_theta"),
    "other choice": (["model.top_k=1"], "top_k"),
    "other scores": (["router.score=softmax"], "router.score"),
    "dense": (["model.num_dense_layers=0"], "num_dense_layers"),
    "no bias": (["router.balance=loss"], "router.balance=both"),
    "other qk-norm": (["model.qk_norm=none"], "qk_norm"),
    "other tokenizer": (["data.tokenizer=bpe", "data.bpe_vocab_size=257"], "another tokenizer"),
    "tied": (["model.tie_embeddings=true"], "tie_embeddings"),
}


@pytest.mark.parametrize("source", ["run", "export"])
@pytest.mark.parametrize("wrong", list(WRONG_STARTS))
def test_a_start_that_does_not_fit(glm: Path, tmp_path: Path, source: str, wrong: str) -> None:
    options, said = WRONG_STARTS[wrong]
    start = glm
    if source == "export":
        start = tmp_path / "start"
        export(glm, start)
    line = [*again(glm), *options, f"init_from={start}", f"run.dir={tmp_path / 'run'}"]
    outcome = fomoe("train", *line)
    assert outcome.status == 2
    assert outcome.err.count("\n") == 1
    assert outcome.err.startswith(f"fomoe: error: init_from {start}")
    assert said in outcome.err
    assert not (tmp_path / "run").exists()
    if wrong != "other tokenizer":  # which is trained on the text
        assert fomoe("train", *line, "--dry-run").err == outcome.err


def test_a_dense_model_is_not_a_start(tmp_path: Path) -> None:
    tiny = write_config(tmp_path)
    trained(tiny, "model.ffn=dense", "rounds=1")
    export(tmp_path / "run", tmp_path / "out")
    for start in ("run", "out"):
        options = [f"init_from={tmp_path / start}", f"run.dir={tmp_path / 'new'}"]
        outcome = fomoe("train", tiny, "model.shared_expert_ffn_dim=16", *options)
        assert outcome.status == 2
        assert outcome.err.count("\n") == 1
        assert "model.ffn=dense" in outcome.err or "num_dense_layers" in outcome.err


@pytest.mark.parametrize(
    "kind", ["empty", "file", "none", "llama", "torn", "lacking", "json", "odd"]
)
def test_a_folder_that_is_no_start(glm: Path, tmp_path: Path, kind: str) -> None:
    start = tmp_path / "start"
    if kind == "empty":
        start.mkdir()
    elif kind == "file":
        start.write_text("")
    elif kind != "none":
        export(glm, start)
    if kind == "llama":
        (start / "config.json").write_text('{"model_type": "llama"}')
    elif kind == "torn":
        (start / "model.safetensors").write_bytes(b"\1" * 40)
    elif kind == "odd":
        settings = json.loads((start / "config.json").read_bytes())
        settings |= {"hidden_size": "16", "rope_parameters": [], "num_attention_heads": None}
        (start / "config.json").write_text(json.dumps(settings))
    elif kind == "json":
        (start / "config.json").write_text("[1")
    elif kind == "lacking":
        tensors = load_file(start / "model.safetensors")
        del tensors["model.layers.2.mlp.experts.1.up_proj.weight"]
        save_file(tensors, start / "model.safetensors")
    outcome = fomoe("train", *again(glm), f"init_from={start}", f"run.dir={tmp_path / 'run'}")
    assert outcome.status in (1, 2)
    assert outcome.err.count("\n") == 1
    assert "init_from" in outcome.err
    assert str(start) in outcome.err
    assert not (tmp_path / "run").exists()


def copied(run: Path, folder: Path) -> Path:
    shutil.copytree(run, folder)
    return folder


def test_what_cannot_be_exported_leaves_nothing(glm: Path, tmp_path: Path) -> None:
    run = copied(glm, tmp_path / "run")
    out = tmp_path / "out"
    (tmp_path / "full").mkdir()
    (tmp_path / "full/model.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    incomplete = copied(glm, tmp_path / "incomplete")
    (round_folder(incomplete, 3) / "site-1.manifest.json").unlink()
    missing = copied(glm, tmp_path / "missing")
    for path in missing.rglob("site-2.*"):
        path.unlink()
    other = copied(glm, tmp_path / "other")
    config = json.loads((round_folder(other, 3) / "site-0.json").read_bytes())["config"]
    assert config["data"]["tokenizer"] == "byte"
    before = snapshot(tmp_path)
    for line, said in {
        (missing,): "site 2",
        (incomplete, "--round", 3): "site-1.manifest.json is missing",
        (run, "--round", 9): "has no checkpoint of round 9, only [3, 2, 1]",
        (tmp_path / "nowhere",): "is not a run's folder",
        (run, "--format", "olmoe"): "cannot say this model: it has no qk-norm of kind head",
        (run, "--format", "mistral"): "must be one of olmoe",
        (run, "--dtype", "int8"): "must be one of fp32",
        (run, "--out", tmp_path / "full"): "is in the way: it is not empty",
        (run, "--out", tmp_path / "file"): "is in the way: it is a file",
        (run, "--out", tmp_path / "file/below"): "cannot be written",
    }.items():
        target = [] if "--out" in line else ["--out", out]
        outcome = fomoe("export", *line, *target)
        assert outcome.status in (1, 2)
        assert outcome.err.count("\n") == 1
        assert said in outcome.err
        assert snapshot(tmp_path) == before
    assert not out.exists()
    # The newest round that is whole is taken, and a reason given.
    outcome = fomoe("export", incomplete, "--out", out)
    assert outcome.status == 0
    assert "site-1.manifest.json is missing" in outcome.err
    assert "exported round 2" in outcome.err


def test_a_disk_that_fails_leaves_nothing(
    glm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("fomoe.exporting.write_tokenizer", fail)
    outcome = fomoe("export", glm, "--out", tmp_path / "out")
    assert outcome.status == 1
    assert outcome.err == (
        f"fomoe: error: {tmp_path / 'out'} cannot be written: No space left on device\n"
    )
    assert list(tmp_path.iterdir()) == []


def test_a_run_whose_tokenizer_is_lost_or_another(tmp_path: Path) -> None:
    options = ["data.tokenizer=bpe", "data.bpe_vocab_size=300"]
    trained(write_config(tmp_path), *SETTINGS["mixtral"], *options, "rounds=1")
    kept = tmp_path / "run/tokenizer.json"
    text = kept.read_text()
    kept.unlink()
    outcome = fomoe("export", tmp_path / "run", "--out", tmp_path / "out")
    assert "tokenizer.json does not exist; it is in the folder of site 0" in outcome.err
    kept.write_text(text.replace("<|endoftext|>", "<eos>"))
    outcome = fomoe("eval", tmp_path / "run")
    assert "is not the one that" in outcome.err
    assert outcome.err.count("\n") == 1


# ------------------------------------------------------------------------------- eval and generate


def test_eval_gives_the_figures_of_the_run(glm: Path) -> None:
    """To the last bit: the same evaluation on the same sequences."""
    summary = json.loads((glm / "summary.json").read_bytes())
    result = fomoe("eval", glm, "--json").json
    assert result["merged"]["loss"] == summary["val_loss_merged"]
    assert [own["loss"] for own in result["sites"]] == summary["val_loss_local"]
    assert result["round"] == 3
    assert result["tokens"] == 6 * 16
    assert result["merged"]["perplexity"] == math.exp(summary["val_loss_merged"])
    bits = summary["val_loss_merged"] / math.log(2) * result["tokens"] / result["bytes"]
    assert result["merged"]["bits_per_byte"] == pytest.approx(bits)
    earlier = fomoe("eval", glm, "--round", 1, "--json").json
    assert earlier["merged"]["loss"] != summary["val_loss_merged"]
    table = fomoe("eval", glm)
    assert table.status == 0
    assert f"{summary['val_loss_merged']:.4f}" in table.out
    assert "site 3" in table.out


@pytest.mark.parametrize("length", [3, 200])
def test_eval_on_a_text(glm: Path, tmp_path: Path, length: int) -> None:
    path = tmp_path / "own.txt"
    path.write_text(words(length, 5))
    result = fomoe("eval", glm, "--text", path, "--json").json
    size = len(path.read_bytes())
    tokens = torch.tensor([*path.read_bytes(), 256])
    seq = min(16, size)
    windows = tokens[: len(tokens) // seq * seq + 1].unfold(0, seq + 1, seq)
    logits = our_logits(our_model(glm), windows[:, :-1])
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten())
    assert result["merged"]["loss"] == pytest.approx(float(loss), abs=1e-5)
    assert result["tokens"] == windows[:, 1:].numel()
    assert result["bytes"] == int((windows[:, 1:] < 256).sum())


def test_what_eval_refuses(glm: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("")
    for line, said in {
        ("--text", tmp_path / "none.txt"): "does not exist",
        ("--text", tmp_path): "is a folder",
        ("--text", tmp_path / "empty.txt"): "holds no text",
        ("--round", 7): "no checkpoint of round 7",
        ("--device", "tpu"): "is not a device",
    }.items():
        outcome = fomoe("eval", glm, *line)
        assert outcome.status in (1, 2)
        assert outcome.err.count("\n") == 1
        assert said in outcome.err


def test_eval_of_a_run_whose_text_has_changed(tmp_path: Path) -> None:
    tiny = write_config(tmp_path)
    trained(tiny, "rounds=1")
    write_texts(tmp_path / "texts", length=70)
    outcome = fomoe("eval", tmp_path / "run")
    assert outcome.status == 2 or outcome.status == 1
    assert outcome.err.startswith("fomoe: error: the held-out part is no longer that of")
    path = tmp_path / "own.txt"
    path.write_text(words(20, 5))
    assert fomoe("eval", tmp_path / "run", "--text", path).status == 0


def test_generate_draws_by_its_seed(glm: Path) -> None:
    pytest.importorskip("transformers")

    def sample(*options: object) -> str:
        outcome = fomoe("generate", glm, "--prompt", "site", "--max-tokens", 12, *options)
        assert outcome.status == 0, outcome.err
        assert outcome.out.startswith("site")
        return outcome.out

    assert sample("--seed", 1) == sample("--seed", 1)
    assert len({sample("--seed", seed) for seed in (1, 2, 3)}) > 1
    likeliest = sample("--temperature", 0)
    assert likeliest == sample("--top-k", 1, "--seed", 4)


def test_what_generate_refuses(glm: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for option, value in {
        "--max-tokens": 0,
        "--temperature": "nan",
        "--top-k": -1,
        "--seed": 2**40,
    }.items():
        outcome = fomoe("generate", glm, "--prompt", "a", option, value)
        assert outcome.status == 2
        assert outcome.err.startswith(f"fomoe: error: {option} {value} must be from ")

    def absent(name: str) -> Any:
        raise ModuleNotFoundError(name=name)

    monkeypatch.setattr(fomoe_generate, "import_module", absent)
    outcome = fomoe("generate", glm, "--prompt", "a")
    assert outcome.err == (
        "fomoe: error: generate needs transformers: pip install 'fomoe[transformers]'\n"
    )
