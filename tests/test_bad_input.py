"""Mistakes: each gives one clear line and a non-zero exit, and nothing saved is lost."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import yaml
from helpers_cli import Outcome, fomoe, snapshot, tiny_tree, trained, words, write_config

from fomoe.checkpoint import saved_rounds

SHARDS = ("data.tokenizer=none", "model.vocab_size=100")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a finished run that every mistake must leave alone."""
    folder = tmp_path_factory.mktemp("saved")
    trained(write_config(folder))
    return folder


def assert_refused(outcome: Outcome, *parts: str) -> None:
    """One line on stderr, in which every part stands."""
    assert outcome.status not in (0, None)
    assert outcome.out == ""
    assert outcome.err.startswith("fomoe: error")
    assert outcome.err.count("\n") == 1, outcome.err
    assert outcome.err.endswith("\n")
    assert "Traceback" not in outcome.err
    for part in parts:
        assert part in outcome.err


# ----------------------------------------------------------------------------------------- options

OPTIONS = [
    (["local_step=3"], "local_step is not an option; did you mean local_steps?"),
    (["outr.lr=0.1"], "outr is not an option; did you mean outer?"),
    (["model.depth=3"], "model.depth is not an option"),
    (["rounds=many"], "rounds 'many' must be an integer"),
    (["inner.lr=fast"], "inner.lr 'fast' must be a number"),
    (["inner.lr=-1"], "inner.lr -1 must be greater than 0"),
    (["inner.beta2=1"], "inner.beta2 1 must be less than 1"),
    (["model.tie_embeddings=2"], "model.tie_embeddings 2 must be true or false"),
    (["placement=cyclic"], "placement cyclic must be a section"),
    (["local_steps=0"], "local_steps 0 must be at least 1"),
    (["rounds=0"], "rounds 0 must be at least 1"),
    (["num_sites=0"], "num_sites 0 must be at least 1"),
    (["method=dilocco"], "method 'dilocco' must be one of fomoe, diloco"),
    (["method=diloco", "placement.replication_factor=1"], "contradicts method diloco"),
    (["placement.replication_factor=4"], "replication_factor 4 exceeds the 3 sites"),
    (["model.top_k=5"], "model.top_k 5 exceeds the 4 experts"),
    (
        ["placement.replication_factor=null", "placement.capacity=[1,1,1]"],
        "placement.capacity [1, 1, 1] has 3 slots and leaves an expert of 4 without a holder",
    ),
    (["placement.capacity=[1,2]"], "placement.capacity [1, 2] must give one number for each"),
    (["placement.replication_factor=null"], "placement.replication_factor null"),
    (["model.num_heads=5"], "model.num_heads 5 does not divide d_model 16"),
    (["model.vocab_size=200"], "model.vocab_size 200 is below the tokenizer's 257 tokens"),
    (["data.seq_len=1"], "data.seq_len 1 must be at least 2"),
    (["data.sites=[a.txt]"], "data.sites ['a.txt'] must name one source for each of the 3 sites"),
    (["data.held_out_fraction=1.5"], "data.held_out_fraction 1.5 must be less than 1"),
    (["sync.timeout_s=0.1"], "sync.timeout_s 0.1 must be at least 1"),
    (["sync.timeout_s=1e9"], "sync.timeout_s 1000000000.0 must be at most 1000000"),
    (["run.wandb=sometimes"], "run.wandb 'sometimes' must be one of off, offline or online"),
    (["outer.optimizer=Sgd"], "outer.optimizer Sgd must be an elementwise class of torch.optim"),
    (["outer.optimizer=LBFGS"], "outer.optimizer LBFGS must be an elementwise class"),
    (["outer.options.damping=1"], "unexpected keyword argument 'damping'"),
    (["outer.optimizer=Adam", "outer.options.betas=[0.9]"], "is refused by torch.optim.Adam"),
    (["outer.optimizer=Adam", "outer.options.capturable=true"], "is refused by torch.optim.Adam"),
    (["outer.options={foreach: true, fused: true}"], "is refused by torch.optim.SGD"),
    (["rounds"], "override rounds must have the form section.option=value"),
    (["rounds=[1"], "rounds [1 is not valid YAML"),
    (["rounds = 3"], "override 'rounds = 3' has spaces around its name; did you mean rounds=3?"),
    (["run.carrierpigeon=x"], "run.carrierpigeon is not an option of run; choose from dir,"),
    (["outer.optimizer=Muon"], "outer.optimizer Muon must be an elementwise class"),
    (["run.dir="], "run.dir '' must not be empty"),
    (["run.dir=a\0b"], "run.dir 'a\\x00b' must not hold a NUL"),
    (["data.source=nowhere.txt"], "data source nowhere.txt does not exist"),
    (["data.source=x.bin", *SHARDS], "data source x.bin does not exist"),
    (["data.sites=nowhere.txt,b,c"], "data source b does not exist"),
    (["data.held_out=nowhere/*.txt"], "data source nowhere/*.txt does not exist"),
    (["data.tokenizer=none.json", "model.vocab_size=9"], "data.tokenizer none.json cannot be"),
    (["num_sites=1000000000"], "num_sites 1000000000 must be at most 4096"),
    (["model.num_layers=1000000000"], "model.num_layers 1000000000 must be at most 10000"),
    (["model.num_experts=1000000000"], "model.num_experts 1000000000 in 2 layers and on 2 sites"),
    (["model.expert_ffn_dim=1000000000", "model.d_model=1000000"], "more than 10^15 parameters"),
    (["model.vocab_size=1000000000", "model.d_model=10000000"], "more than 10^15 parameters"),
    (["model.dense_ffn_dim=10000000000"], "model.dense_ffn_dim 10000000000 must be at most"),
    (["inner.batch_size=1000000000"], "x data.seq_len 16 is more than 1000000000 tokens at once"),
    (["data.num_shards=1000000000"], "data.num_shards 1000000000 must be at most 100000"),
    (["rounds=1000000000000"], "rounds 1000000000000 must be at most 100000000"),
    (["sync.timeout_s=1e30"], "sync.timeout_s 1e+30 must be at most 1000000"),
    (["--fast"], "argument --fast is not known"),
    (["--overwrite", "--resume"], "not allowed with argument"),
    (["--device", "gpu"], "--device gpu is not a device of this machine"),
    (["--device", "cuda:99"], "--device cuda:99 is not a device of this machine"),
    (["--device", "meta"], "--device meta is not a device of this machine"),
]


@pytest.mark.parametrize(("words", "message"), OPTIONS, ids=[" ".join(w) for w, _ in OPTIONS])
def test_a_wrong_option(saved: Path, words: list[str], message: str) -> None:
    before = snapshot(saved)
    mode = [] if "--resume" in words else ["--overwrite"]
    assert_refused(fomoe("train", saved / "tiny.yaml", *words, *mode), message)
    assert snapshot(saved) == before


REFUSED_DRY = [(w, m) for w, m in OPTIONS if not any(word.startswith("--") for word in w)]


@pytest.mark.parametrize(
    ("words", "message"), REFUSED_DRY, ids=[" ".join(w) for w, _ in REFUSED_DRY]
)
def test_a_dry_run_and_a_comparison_refuse_what_training_refuses(
    saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, words: list[str], message: str
) -> None:
    """Before anything is trained: the comparison's first method would have gone well."""
    before = snapshot(saved)
    monkeypatch.chdir(tmp_path)
    assert_refused(fomoe("train", saved / "tiny.yaml", *words, "--dry-run"), message)
    if not any(word.startswith("method=") for word in words):  # which a comparison overrules
        outcome = fomoe("compare", saved / "tiny.yaml", *words, "--methods", "fomoe", "--overwrite")
        assert_refused(outcome, message)
    assert snapshot(saved) == before
    assert not list(tmp_path.iterdir())


def test_a_dry_run_refuses_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    config = write_config(tmp_path)
    for run_dir in (config, config / "below" / "it"):
        outcome = fomoe("train", config, "--dry-run", f"run.dir={run_dir}")
        assert_refused(outcome, f"run.dir {run_dir}: {config} is a file, not a folder")


def test_a_dry_run_at_a_site_needs_no_text_of_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "b.txt").write_text(words(90, 0))
    config = write_config(tmp_path)
    sites = [f"data.sites=[a.txt,{tmp_path}/b.txt,c.txt]", f"data.held_out={tmp_path}/b.txt"]
    assert_refused(fomoe("train", config, "--dry-run", *sites), "data source a.txt does not exist")
    monkeypatch.setenv("RANK", "1")
    assert fomoe("train", config, "--dry-run", *sites).status == 0
    outcome = fomoe("train", config, "--dry-run", *sites, "data.held_out=null")
    assert_refused(outcome, "data source a.txt does not exist")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "required"),
        (["trian", "x.yaml"], "trian is not a command; did you mean train?"),
        (["projct"], "projct is not a command; did you mean project?"),
        (["tensorboard"], "tensorboard is not a command; choose from train, compare, merge"),
        (["train"], "CONFIG"),
        (["compare", "CONFIG"], "--methods"),
        (
            ["compare", "CONFIG", "--methods", "ddp,dilco"],
            "dilco is not a method; did you mean diloco?",
        ),
        (
            ["compare", "CONFIG", "--methods", "fsdp"],
            "fsdp is not a method; choose from fomoe, diloco",
        ),
        (["compare", "CONFIG", "--methods", "ddp,ddp"], "--methods ddp is given twice"),
        (["compare", "CONFIG", "--methods", "ddp", "rounds=0"], "rounds 0 must be at least 1"),
        (["merge", "SAVED/nothing"], "is not a run's folder"),
        (["merge", "SAVED/run", "--round", "x"], "invalid int value: 'x'"),
        (["merge", "SAVED/run", "--round", "7"], "no checkpoint of round 7"),
        (["merge", "SAVED/run", "--out", "SAVED/tiny.yaml"], "cannot be written"),
    ],
)
def test_a_wrong_command(saved: Path, words: list[str], message: str) -> None:
    before = snapshot(saved)
    names = {"CONFIG": str(saved / "tiny.yaml")}
    given = [names.get(word, word.replace("SAVED", str(saved))) for word in words]
    assert_refused(fomoe(*given), message)
    assert snapshot(saved) == before


# ------------------------------------------------------------------------------------- config files


def broken(path: Path) -> None:
    path.write_text("model: {d_model: 16\nrounds: 3\n")


def twice(path: Path) -> None:
    path.write_text("rounds: 3\nrounds: 4\n")


def listed(path: Path) -> None:
    path.write_text("- rounds: 3\n")


def binary(path: Path) -> None:
    path.write_bytes(bytes(range(128, 256)) * 4)


def control(path: Path) -> None:
    path.write_bytes(b"rounds: 3\x00\n")


def tagged(path: Path) -> None:
    path.write_text("rounds: !!python/object/apply:os.system ['true']\n")


FILES: list[tuple[Callable[[Path], object], str]] = [
    (lambda path: None, "does not exist"),
    (Path.mkdir, "is a folder"),
    (broken, "is not valid YAML"),
    (twice, "appears twice"),
    (listed, "must hold a mapping of options"),
    (binary, "is not UTF-8 text at offset 0 (byte 0x80)"),
    (control, "holds a NUL at offset 9"),
    (tagged, "is not valid YAML"),
]


@pytest.mark.parametrize(("make", "message"), FILES, ids=[m for _, m in FILES])
def test_a_wrong_config_file(tmp_path: Path, make: Callable[[Path], object], message: str) -> None:
    path = tmp_path / "given.yaml"
    make(path)
    assert_refused(fomoe("train", path), f"config {path}"[:70], message)


def test_a_config_file_with_a_near_name(tmp_path: Path) -> None:
    write_config(tmp_path)
    outcome = fomoe("train", tmp_path / "tniy.yaml")
    assert_refused(outcome, "does not exist; did you mean", "tiny.yaml?")


# -------------------------------------------------------------------------------------- data files


def write_bin(path: Path, tokens: np.ndarray, count: int | None = None) -> None:
    header = np.zeros(256, dtype="<i4")
    header[:3] = 20240520, 1, len(tokens) if count is None else count
    path.write_bytes(header.tobytes() + tokens.astype(np.uint16).tobytes())


def cut(path: Path, size: int) -> None:
    write_bin(path, np.arange(20_000) % 100)
    path.write_bytes(path.read_bytes()[:size])


def negative(path: Path) -> None:
    np.save(path, np.where(np.arange(20_000) == 500, -1, 3))


DATA: list[tuple[str, Callable[[Path], object], tuple[str, ...], tuple[str, ...]]] = [
    ("a.txt", lambda path: None, (), ("FILE does not exist",)),
    ("a.txt", lambda path: path.write_text(""), (), ("FILE holds no text",)),
    ("a.txt", lambda path: path.write_text(" \n\n "), (), ("FILE holds no text",)),
    ("a.txt", Path.mkdir, (), ("FILE is a folder",)),
    ("a.txt", lambda path: path.write_text("few"), (), ("FILE gives a single piece; held out: 1",)),
    (
        "a.txt",
        lambda path: path.write_text("the same line\n" * 64 * 78),
        (),
        ("gives 64 identical pieces; held out: 64 (identical ones", "left for 3 part(s): 0"),
    ),
    (
        "a.txt",
        lambda path: path.write_text("few"),
        ("data.num_shards=9",),
        ("left for 9 part(s): 0",),
    ),
    ("a.txt", lambda path: path.write_text(words(9000, 0)), ("data.seq_len=40000",), ("40001",)),
    ("*.none", lambda path: None, (), ("FILE does not exist",)),
    ("a.bin", lambda path: None, SHARDS, ("FILE does not exist",)),
    ("a.bin", lambda path: cut(path, 0), SHARDS, ("FILE has no known .bin header",)),
    ("a.bin", lambda path: cut(path, 700), SHARDS, ("FILE has no known .bin header",)),
    ("a.bin", lambda path: cut(path, 3000), SHARDS, ("FILE is shorter than the 20000 tokens",)),
    ("a.bin", lambda path: path.write_text(words(900, 0)), SHARDS, ("FILE has no known",)),
    ("a.bin", lambda path: write_bin(path, np.zeros(9), -5), SHARDS, ("FILE has a damaged",)),
    ("a.bin", lambda path: write_bin(path, np.zeros(0)), SHARDS, ("0 tokens", "seq_len + 1")),
    (
        "a.bin",
        lambda path: write_bin(path, np.arange(20_000) % 101),
        SHARDS,
        ("model.vocab_size 100 does not cover token 100 of FILE",),
    ),
    ("a.npy", lambda path: np.save(path, np.zeros(9000)), SHARDS, ("FILE must be a flat integer",)),
    ("a.npy", lambda path: path.write_text("hello"), SHARDS, ("FILE cannot be read",)),
    ("a.npy", negative, SHARDS, ("FILE has a negative token, -1",)),
]


@pytest.mark.parametrize(
    ("name", "make", "overrides", "parts"),
    DATA,
    ids=[f"{name}: {parts[0]}" for name, _, _, parts in DATA],
)
def test_wrong_data(
    saved: Path,
    tmp_path: Path,
    name: str,
    make: Callable[[Path], object],
    overrides: tuple[str, ...],
    parts: tuple[str, ...],
) -> None:
    path, before = tmp_path / name, snapshot(saved)
    make(path)
    outcome = fomoe("train", saved / "tiny.yaml", "--overwrite", f"data.source={path}", *overrides)
    assert_refused(outcome, *(part.replace("FILE", str(path)) for part in parts))
    assert snapshot(saved) == before


def test_a_token_that_only_training_meets(tmp_path: Path) -> None:
    """Large shards are not read whole at the start: the batch that has the token is refused."""
    tokens = np.zeros(1_100_000)
    tokens[1_040_000:] = 7
    write_bin(tmp_path / "a.bin", tokens)
    write_bin(tmp_path / "held.bin", np.zeros(400))
    outcome = fomoe(
        "train",
        write_config(tmp_path),
        f"data.source={tmp_path}/a.bin",
        f"data.held_out={tmp_path}/held.bin",
        "data.tokenizer=none",
        "model.vocab_size=7",
        "local_steps=60",
    )
    assert_refused(outcome, "token 7 in the training data", "model.vocab_size 7")


def test_a_held_out_source_that_is_missing_or_short(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("few")
    for name, message in (("none", "does not exist"), ("short", "the held-out part has 4 tokens")):
        held = f"data.held_out={tmp_path}/{name}.txt"
        assert_refused(fomoe("train", saved / "tiny.yaml", "--overwrite", held), message)


# -------------------------------------------------------------------------------------- tokenizers


def test_a_tokenizer_file_that_is_none(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.json").write_text("{}")
    (tmp_path / "folder").mkdir()
    before = snapshot(saved)
    for name in ("missing.json", "empty.json", "folder"):
        given = f"data.tokenizer={tmp_path / name}"
        words = ["--overwrite", given, "model.vocab_size=300"]
        outcome = fomoe("train", saved / "tiny.yaml", *words)
        assert_refused(outcome, f"data.tokenizer {tmp_path / name} cannot be loaded")
    assert snapshot(saved) == before


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("data.tokenizer=no-such-team/no-such-name", "data.tokenizer no-such-team/no-such-name"),
        ("data.source=hf:no-such-team/no-such-name", "data source hf:no-such-team/no-such-name"),
    ],
)
def test_a_hub_name_that_is_not_there(
    saved: Path, override: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tests are offline; a mistyped name must not reach for the network and wait."""
    before, dialled = snapshot(saved), []
    monkeypatch.setattr(socket.socket, "connect", lambda _, address: dialled.append(address))
    words = [override, "model.vocab_size=300", "--overwrite"]
    assert_refused(fomoe("train", saved / "tiny.yaml", *words), message)
    assert not dialled
    assert snapshot(saved) == before


# -------------------------------------------------------------------------------------- run folders


def test_a_run_folder_that_cannot_be_used(saved: Path) -> None:
    before = snapshot(saved)
    config = saved / "tiny.yaml"
    for mode in ("--resume", "--overwrite", "--next-free"):
        outcome = fomoe("train", config, f"run.dir={config}", mode)
        assert_refused(outcome, f"run.dir {config} is a file, not a folder")
    assert_refused(fomoe("train", config, f"run.dir={config}"), f"run.dir {config} is a file")
    below = f"run.dir={config}/below"
    assert_refused(fomoe("train", config, below), f"run.dir {config}/below cannot be made")
    assert_refused(fomoe("train", config), f"run.dir {saved / 'run'} already holds a run")
    assert snapshot(saved) == before


def test_a_run_folder_that_is_not_writable(tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("a superuser may write everywhere")
    config = write_config(tmp_path)
    (tmp_path / "run").mkdir(mode=0o500)
    assert_refused(fomoe("train", config), "Permission denied")


def test_resume_with_another_model_or_options(saved: Path) -> None:
    before = snapshot(saved / "run" / "checkpoints")
    for override in ("model.d_model=32", "model.num_experts=8", "num_sites=2", "seed=4"):
        outcome = fomoe("train", saved / "tiny.yaml", "rounds=3", "--resume", override)
        assert_refused(outcome, "is of another experiment", override.partition("=")[0])
    assert snapshot(saved / "run" / "checkpoints") == before
    assert_refused(fomoe("train", saved / "tiny.yaml", "rounds=1", "--resume"), "rounds 1")


@pytest.mark.parametrize("method", ["fomoe", "ddp", "single"])
def test_training_that_diverges(tmp_path: Path, method: str) -> None:
    """It stops before a record or a checkpoint is made of it."""
    wild = ["inner.optimizer=sgd", "inner.lr=1e30", "inner.clip_norm=0", f"method={method}"]
    outcome = fomoe("train", write_config(tmp_path), *wild)
    assert_refused(outcome, "site 0: its parameters are not finite")
    assert saved_rounds(tmp_path / "run") == []
    assert (tmp_path / "run" / "metrics.jsonl").read_text() == ""


# ------------------------------------------------------------------------ interrupts and full disks


def start(folder: Path, *words: str) -> subprocess.Popen[str]:
    """`fomoe train` of a folder's experiment in a process of its own."""
    root = str(Path(__file__).resolve().parent.parent)
    path = os.pathsep.join(part for part in (root, os.environ.get("PYTHONPATH")) if part)
    return subprocess.Popen(
        [sys.executable, "-m", "fomoe", "train", str(folder / "tiny.yaml"), *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        # A shell's background jobs ignore Ctrl-C and hand that down; a user's terminal does not.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def interrupt(process: subprocess.Popen[str], run_dir: Path, number: int) -> tuple[str, str]:
    """Signal a run in the middle of its third round or later; returns what it printed."""
    deadline = time.monotonic() + 90
    while len(saved_rounds(run_dir)) < 2 and time.monotonic() < deadline:
        assert process.poll() is None
        time.sleep(0.02)
    time.sleep(0.05)
    process.send_signal(number)
    return process.communicate(timeout=60)


def test_an_interrupt_in_a_round_keeps_the_checkpoints(tmp_path: Path) -> None:
    """Ctrl-C, and SIGTERM, which schedulers send."""
    signals = {"ctrl-c": signal.SIGINT, "sigterm": signal.SIGTERM}
    slow = ["rounds=500", "local_steps=20", "inner.schedule_steps=100", "run.keep_checkpoints=2"]
    processes = {}
    for name in signals:
        (tmp_path / name).mkdir()
        write_config(tmp_path / name)
        processes[name] = start(tmp_path / name, *slow)
    try:
        for name, number in signals.items():
            run_dir, process = tmp_path / name / "run", processes[name]
            out, err = interrupt(process, run_dir, number)
            *lines, last = err.splitlines()
            assert process.returncode not in (0, -number)
            assert out == ""
            assert last == "fomoe: error: interrupted; checkpoints are kept, --resume continues"
            assert all(re.match(r"round \d+/500 ", line) for line in lines), err
            done = saved_rounds(run_dir)[0]
            more = [f"rounds={done + 1}", *slow[1:], "--resume"]
            outcome = fomoe("train", tmp_path / name / "tiny.yaml", *more)
            assert outcome.status == 0, outcome.err
            assert re.search(rf"resuming after round ({done}|{done - 1})\n", outcome.err)
            assert saved_rounds(run_dir)[0] == done + 1
    finally:
        for process in processes.values():
            process.kill()
            process.communicate()


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of its own with little room."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", str(folder)]
    if os.geteuid() != 0 or not sys.platform.startswith("linux"):
        pytest.skip("needs a superuser on Linux, to mount a small file system")
    if subprocess.run(command, capture_output=True).returncode != 0:
        pytest.skip("this machine does not allow mounting")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def fill(folder: Path, *, leave: int) -> Path:
    """Take all room but some."""
    free = os.statvfs(folder).f_bavail * os.statvfs(folder).f_frsize
    path = folder / "filler"
    path.write_bytes(b"x" * (free - leave))
    return path


@pytest.mark.parametrize("leave", [0, 4096, 300_000])
def test_a_full_disk_loses_nothing(tmp_path: Path, small_disk: Path, leave: int) -> None:
    config, run_dir = write_config(tmp_path), small_disk / "run"
    where = f"run.dir={run_dir}"
    always = [config, "run.eval_merged_every=1"]
    trained(*always, where, "rounds=1")
    straight = trained(*always, "rounds=3")
    before = snapshot(run_dir / "checkpoints")
    filler = fill(small_disk, leave=leave)
    outcome = fomoe("train", *always, where, "rounds=3", "--resume", "--json")
    lines = outcome.err.splitlines()
    assert outcome.status == 1
    assert outcome.out == ""
    assert [line for line in lines if "error" in line] == lines[-1:]
    assert "No space left on device" in lines[-1]
    assert str(run_dir) in lines[-1]
    after = snapshot(run_dir / "checkpoints")
    assert {name: after.get(name) for name in before} == before
    filler.unlink()
    again = trained(*always, where, "rounds=3", "--resume")
    assert again["val_loss_merged"] == straight["val_loss_merged"]
    rows = (run_dir / "metrics.jsonl").read_text().splitlines()
    assert rows == sorted(set(rows), key=rows.index)
    assert len(rows) == len((tmp_path / "run" / "metrics.jsonl").read_text().splitlines())


def test_a_disk_that_is_full_from_the_start(tmp_path: Path, small_disk: Path) -> None:
    filler = fill(small_disk, leave=0)
    outcome = fomoe("train", write_config(tmp_path), f"run.dir={small_disk / 'run'}")
    assert_refused(outcome, "No space left on device", str(small_disk / "run"))
    filler.unlink()


def test_the_tiny_experiment_itself_is_right(tmp_path: Path) -> None:
    """Else the tests above would pass for the wrong reason."""
    (tmp_path / "copy.yaml").write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    outcome = fomoe("train", tmp_path / "copy.yaml")
    assert outcome.status == 0
    assert "error" not in outcome.err
