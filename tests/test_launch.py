"""The launch is checked before anyone waits, and a wait can be interrupted."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from helpers_cli import Outcome, fomoe, trained, write_config

ROOT = Path(__file__).resolve().parent.parent
LAUNCH = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT", "SLURM_PROCID")
SITE_0 = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "29731"}


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> Callable[[dict[str, str]], None]:
    """Sets the launch environment, and nothing else of it."""

    def set_only(given: dict[str, str]) -> None:
        for name in LAUNCH:
            monkeypatch.delenv(name, raising=False)
        for name, value in given.items():
            monkeypatch.setenv(name, value)

    return set_only


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def assert_refused(outcome: Outcome, message: str) -> None:
    """One line, and a failing exit status."""
    assert outcome.status == 2, outcome.err
    assert outcome.out == ""
    assert outcome.err.startswith("fomoe: error")
    assert outcome.err.count("\n") == 1
    assert message in outcome.err


# ------------------------------------------------------------------------------- the environment

WRONG: list[tuple[dict[str, str], str]] = [
    ({"RANK": "0", "WORLD_SIZE": "3"}, "MASTER_ADDR must be set to site 0's address"),
    (
        {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": ""},
        "MASTER_ADDR must be set to site 0's address",
    ),
    (
        {"RANK": "0", "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"},
        "MASTER_PORT must be set to a port of site 0",
    ),
    ({"MASTER_PORT": ""}, "MASTER_PORT must be set to a port of site 0"),
    ({"MASTER_PORT": "abc"}, "MASTER_PORT 'abc' must be an integer"),
    ({"MASTER_PORT": "2973x"}, "MASTER_PORT '2973x' must be an integer"),
    ({"MASTER_PORT": "99999"}, "MASTER_PORT 99999 must be from 1 to 65535"),
    ({"MASTER_PORT": "0"}, "MASTER_PORT 0 must be from 1 to 65535"),
    ({"MASTER_PORT": "-1"}, "MASTER_PORT -1 must be from 1 to 65535"),
    ({"RANK": "3"}, "RANK 3 must be from 0 to 2: WORLD_SIZE is 3"),
    ({"RANK": "5"}, "RANK 5 must be from 0 to 2"),
    ({"RANK": "-1"}, "RANK -1 must be from 0 to 2"),
    ({"RANK": "first"}, "RANK 'first' must be an integer"),
    ({"RANK": ""}, "RANK '' must be an integer"),
    ({"RANK": "1.0"}, "RANK '1.0' must be an integer"),
    ({"WORLD_SIZE": "many"}, "WORLD_SIZE 'many' must be an integer"),
    ({"WORLD_SIZE": "0"}, "WORLD_SIZE 0 must be at least 1"),
    ({"WORLD_SIZE": "2"}, "WORLD_SIZE 2 must equal num_sites, which is 3"),
    ({"WORLD_SIZE": "4"}, "WORLD_SIZE 4 must equal num_sites, which is 3"),
    ({"RANK": "3", "WORLD_SIZE": "1"}, "RANK 3 must be from 0 to 0: WORLD_SIZE is 1"),
    ({"LOCAL_RANK": "gpu"}, "LOCAL_RANK 'gpu' must be an integer"),
    ({"LOCAL_RANK": "-1"}, "LOCAL_RANK -1 must be from 0 to 2"),
    ({"LOCAL_RANK": "7"}, "LOCAL_RANK 7 must be from 0 to 2"),
]


@pytest.mark.parametrize(
    ("given", "message"), WRONG, ids=[" ".join(f"{k}={v}" for k, v in g.items()) for g, _ in WRONG]
)
def test_a_wrong_environment_is_refused(environment, tmp_path: Path, given, message: str) -> None:
    """Before any wait, with the variable, its value and the rule."""
    whole = {"RANK": "0", "WORLD_SIZE": "3", "LOCAL_RANK": "0", **SITE_0}
    environment(given if {"RANK", "WORLD_SIZE"} <= given.keys() else whole | given)
    assert_refused(fomoe("train", write_config(tmp_path), "sync.timeout_s=1"), message)
    assert not (tmp_path / "run").exists()


def test_a_name_that_is_no_address_is_refused(environment, tmp_path: Path, monkeypatch) -> None:
    def unknown(*_, **__):
        raise socket.gaierror(socket.EAI_NONAME, "Name or service not known")

    monkeypatch.setattr(socket, "getaddrinfo", unknown)
    environment({"RANK": "1", "WORLD_SIZE": "3", "MASTER_ADDR": "nowhere", "MASTER_PORT": "29731"})
    outcome = fomoe("train", write_config(tmp_path), "sync.timeout_s=1")
    assert_refused(outcome, "MASTER_ADDR nowhere cannot be resolved: Name or service not known")


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--device", "gpu"], "--device gpu is not a device of this machine"),
        (["--interface", "none0"], "--interface none0 is not a network interface of this machine"),
    ],
)
def test_a_mistake_of_one_site_is_reported_before_it_waits(
    environment, tmp_path: Path, words: list[str], message: str
) -> None:
    environment({"RANK": "1", "WORLD_SIZE": "3", **SITE_0})
    outcome = fomoe("train", write_config(tmp_path), "sync.timeout_s=1", *words)
    assert_refused(outcome, f"fomoe: error (site 1): {message}")


def test_a_port_that_is_taken_is_refused_at_site_0(environment, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        environment({"RANK": "0", "WORLD_SIZE": "3", **SITE_0, "MASTER_PORT": str(port)})
        outcome = fomoe("train", write_config(tmp_path), "sync.timeout_s=1")
    assert_refused(outcome, f"MASTER_PORT {port} is in use on this machine")


PROXY = "this is a proxy run, which trains all sites in every process that is started"
UNSURE: list[tuple[dict[str, str], str]] = [
    ({"RANK": "1"}, "RANK is set to '1' but WORLD_SIZE is not"),
    ({"RANK": "x"}, "RANK is set to 'x' but WORLD_SIZE is not"),
    ({"WORLD_SIZE": "3"}, "WORLD_SIZE is set to '3' but RANK is not"),
    ({"SLURM_PROCID": "2", "SLURM_NTASKS": "3"}, "Slurm runs 3 tasks but RANK"),
    ({"RANK": "0", "WORLD_SIZE": "1"}, "WORLD_SIZE is 1 but num_sites is 3"),
]


@pytest.mark.parametrize(("given", "message"), UNSURE, ids=[m for _, m in UNSURE])
def test_a_proxy_run_that_may_be_meant_otherwise_says_so(
    environment, tmp_path: Path, given: dict[str, str], message: str
) -> None:
    """In one line; the run goes on, and every process prints its summary."""
    environment(given)
    outcome = fomoe("train", write_config(tmp_path), "rounds=1", "local_steps=1")
    assert outcome.status == 0, outcome.err
    warnings = [line for line in outcome.err.splitlines() if "warning" in line]
    assert len(warnings) == 1
    assert warnings[0].startswith(f"fomoe: warning: {message}")
    assert PROXY in warnings[0]
    assert "merged validation loss" in outcome.out


def test_a_proxy_run_that_is_meant_says_nothing(environment, tmp_path: Path) -> None:
    environment({"SLURM_PROCID": "0", "SLURM_NTASKS": "1"})
    outcome = fomoe("train", write_config(tmp_path), "rounds=1", "local_steps=1")
    assert "warning" not in outcome.err


def test_methods_are_not_compared_by_several_processes(environment, tmp_path: Path) -> None:
    environment({"RANK": "0", "WORLD_SIZE": "3", **SITE_0})
    outcome = fomoe("compare", write_config(tmp_path), "--methods", "fomoe", "sync.timeout_s=1")
    assert_refused(outcome, "WORLD_SIZE 3 must be 1 for compare")


# ------------------------------------------------------------------------------------ interrupts


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts sites of the tiny experiment as processes; none outlives the test."""
    started: list[subprocess.Popen[str]] = []
    config = write_config(tmp_path)

    def start_one(site: int, port: int, code: str = "") -> subprocess.Popen[str]:
        given = {name: value for name, value in os.environ.items() if name not in LAUNCH}
        given |= {"RANK": str(site), "WORLD_SIZE": "3", "MASTER_ADDR": "127.0.0.1"}
        given |= {"MASTER_PORT": str(port), "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
        program = ["-c", code] if code else ["-m", "fomoe"]
        process = subprocess.Popen(
            [sys.executable, *program, "train", str(config), "--interface", "lo"],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=given,
            # A shell's background jobs ignore Ctrl-C and hand that down; a terminal does not.
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        started.append(process)
        return process

    yield start_one
    for process in started:
        process.kill()
        process.communicate()


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 90
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


INTERRUPTED = "interrupted; checkpoints are kept, --resume continues"


def assert_interrupted(process: subprocess.Popen[str], site: int) -> None:
    out, err = process.communicate(timeout=30)
    assert (process.returncode, out) == (130, ""), err
    assert err.splitlines()[-1] == f"fomoe: error (site {site}): {INTERRUPTED}"


def test_a_site_that_waits_for_others_to_join_can_be_interrupted(start) -> None:
    """Site 0, to which nobody comes, and site 1, whom a stranger lets wait."""
    port = free_port()
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        waiting = {0: start(0, port), 1: start(1, stranger.getsockname()[1])}
        wait_until(lambda: listens(port))
        waiting[0].send_signal(signal.SIGTERM)
        stranger.accept()
        stranger.accept()  # the store's connection, which gets no answer
        waiting[1].send_signal(signal.SIGINT)
        for site, process in waiting.items():
            assert_interrupted(process, site)


# `fomoe train` whose rounds are one exchange: site 2 comes too late for it.
ONE_EXCHANGE = """
import contextlib, time, types
from fomoe import build, cli, training
from fomoe.sync.exchange import gather

def rounds(run):
    gather(run.transport, lambda _: b"here")
    print("ready", flush=True)
    if run.transport.sites == (2,):
        time.sleep(600)
    gather(run.transport, lambda _: b"and here")

training.run_rounds = rounds
build.build_run = lambda _, transport, *__, **___: types.SimpleNamespace(
    transport=transport, progress=contextlib.nullcontext()
)
cli.run()
"""


def test_a_site_that_waits_in_an_exchange_can_be_interrupted(start) -> None:
    """A peer is silent; the other one is told why this site has left."""
    port = free_port()
    sites = [start(site, port, code=ONE_EXCHANGE) for site in range(3)]
    for process in sites:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
    time.sleep(0.3)
    sites[1].send_signal(signal.SIGTERM)
    assert_interrupted(sites[1], 1)
    _, err = sites[0].communicate(timeout=30)
    assert sites[0].returncode == 1
    assert err.startswith("fomoe: error (site 0): exchanging messages failed: site 1 (")
    assert err.endswith("127.0.0.1) stopped: interrupted\n")


# --------------------------------------------------------------------------------------- scripts

# Stands in for Python: prints what it was started with, or does what the real one does.
STUB = """#!/bin/bash
case "$*" in
  -c*) exec REAL "$@" ;;
  *--dry-run*) echo '{"num_sites": 3}'; exit 0 ;;
esac
trap 'echo "site $RANK stops"; exit 130' TERM
echo "$RANK $WORLD_SIZE $LOCAL_RANK $MASTER_ADDR $MASTER_PORT $*"
if [ -n "${STUB_WAITS:-}" ]; then
  for ((i = 0; i < 300; i++)); do sleep 0.1; done
fi
"""


@pytest.fixture
def stub(tmp_path: Path) -> dict[str, str]:
    """An environment in which the launch scripts start a stub."""
    path = tmp_path / "python"
    path.write_text(STUB.replace("REAL", sys.executable))
    path.chmod(0o755)
    given = {name: value for name, value in os.environ.items() if name not in LAUNCH}
    return given | {"PYTHON": str(path)}


def script(name: str, *words: str, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    command = [str(ROOT / "launch" / name), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


ADDRESSES = [
    ("10.8.0.1:29733", "10.8.0.1 29733"),
    ("10.8.0.1", "10.8.0.1 29500"),
    ("node-0.example:1", "node-0.example 1"),
    ("[::1]:29733", "::1 29733"),
    ("[fd00::1]", "fd00::1 29500"),
    ("[fe80::1%eth0]:65535", "fe80::1%eth0 65535"),
]


@pytest.mark.parametrize(("address", "expected"), ADDRESSES, ids=[a for a, _ in ADDRESSES])
def test_the_address_of_site_0_is_split_into_host_and_port(stub, address: str, expected) -> None:
    done = script("site.sh", "02", "3", address, "c.yaml", "a=b c", environment=stub)
    assert done.stdout == f"2 3 0 {expected} -m fomoe train c.yaml a=b c\n", done.stderr
    assert done.stderr == ""


SITES = [
    (("0", "2", "::1"), "stands in brackets, as in [fd00::1]:29500"),
    (("0", "2", "fd00::1:29733"), "stands in brackets"),
    (("0", "2", "[::1"), "stands in brackets"),
    (("0", "2", "[::1]29733"), "stands in brackets"),
    (("0", "2", "host:abc"), "the port 'abc' must be a number from 1 to 65535"),
    (("0", "2", "host:"), "the port '' must be a number from 1 to 65535"),
    (("0", "2", "[::1]:"), "the port '' must be a number from 1 to 65535"),
    (("0", "2", "host:0"), "the port '0' must be a number from 1 to 65535"),
    (("0", "2", "host:65536"), "the port '65536' must be a number from 1 to 65535"),
    (("0", "2", ":29500"), "must begin with a host name or an address"),
    (("0", "2", ""), "must begin with a host name or an address"),
    (("x", "2", "host"), "SITE 'x' must be a number"),
    (("-1", "2", "host"), "SITE '-1' must be a number"),
    (("0", "two", "host"), "NUM_SITES 'two' must be a number"),
    (("", "2", "host"), "SITE '' must be a number"),
    (("2", "2", "host"), "SITE 2 must be below NUM_SITES 2"),
    (("08", "8", "host"), "SITE 8 must be below NUM_SITES 8"),
    (("0", "0", "host"), "SITE 0 must be below NUM_SITES 0"),
]


@pytest.mark.parametrize(("words", "message"), SITES, ids=[" ".join(w) for w, _ in SITES])
def test_a_wrong_site_or_address_is_refused_by_the_script(stub, words, message: str) -> None:
    done = script("site.sh", *words, "c.yaml", environment=stub)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("launch/site.sh: ")
    assert done.stderr.count("\n") == 1
    assert message in done.stderr


def test_all_sites_on_one_machine(stub) -> None:
    done = script("local.sh", "c.yaml", "seed=1", environment=stub)
    assert done.returncode == 0, done.stderr
    rows = sorted(line.split() for line in done.stdout.splitlines())
    port = rows[0][4]
    tail = ["-m", "fomoe", "train", "c.yaml", "seed=1"]
    if Path("/sys/class/net/lo").is_dir():
        tail += ["--interface", "lo"]
    assert rows == [[str(site), "3", "0", "127.0.0.1", port, *tail] for site in range(3)]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_ends_the_script_ends_its_sites(stub, number: int) -> None:
    """Ctrl-C too, which a shell hides from what runs in its background."""
    process = subprocess.Popen(
        [str(ROOT / "launch" / "local.sh"), "c.yaml"],
        stdout=subprocess.PIPE,
        text=True,
        env=stub | {"STUB_WAITS": "1"},
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    assert process.stdout is not None
    started = [process.stdout.readline() for _ in range(3)]
    assert sorted(line[0] for line in started) == ["0", "1", "2"]
    process.send_signal(number)
    assert process.wait(timeout=20) == 130
    assert sorted(process.stdout) == [f"site {site} stops\n" for site in range(3)]


def test_a_site_per_slurm_node(stub, tmp_path: Path) -> None:
    programs = {
        "scontrol": "echo node-a; sleep 0.2; echo node-b",
        "srun": 'shift; for id in 0 1; do SLURM_NODEID=$id SLURM_NNODES=2 "$@"; done',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = stub | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[a-b]",
        "SLURM_JOB_ID": "40007",
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    done = script("slurm.sbatch", "c.yaml", "--resume", environment=given)
    assert done.returncode == 0, done.stderr
    tail = "node-a 20007 -m fomoe train c.yaml --resume"
    assert done.stdout.splitlines() == [f"{site} 2 0 {tail}" for site in range(2)]
    outside = {name: value for name, value in given.items() if not name.startswith("SLURM_JOB")}
    done = script("slurm.sbatch", "c.yaml", environment=outside)
    assert (done.returncode, done.stderr) == (2, "start it by sbatch: no Slurm job is here\n")


def test_a_site_of_several_ranks_has_a_torchrun_of_its_own(stub) -> None:
    for words in (["--ranks", "2"], ["--ranks=02"]):
        done = script("site.sh", "1", "3", "[::1]:29733", "c.yaml", *words, "a=b", environment=stub)
        expected = (
            "-m torch.distributed.run --standalone --nproc-per-node=2 -m fomoe train c.yaml a=b"
        )
        assert done.stdout.strip() == (f"{expected} --site 1 --meet [::1]:29733"), done.stderr
    done = script("site.sh", "1", "3", "host", "c.yaml", "--ranks", "1", environment=stub)
    assert done.stdout == "1 3 0 host 29500 -m fomoe train c.yaml\n"
    for wrong in ("0", "two", ""):
        done = script("site.sh", "0", "2", "host", "c.yaml", "--ranks", wrong, environment=stub)
        text = f"launch/site.sh: --ranks '{wrong}' must be a number above 0\n"
        assert (done.returncode, done.stderr) == (2, text)


def slurm(stub: dict[str, str], tmp_path: Path, nodes: int, **more: str) -> list[str]:
    """What slurm.sbatch starts at each of some nodes."""
    ids = " ".join(map(str, range(nodes)))
    programs = {
        "scontrol": "; ".join(f"echo node-{i}" for i in range(nodes)),
        "srun": f'shift; for id in {ids}; do SLURM_NODEID=$id SLURM_NNODES={nodes} "$@"; done',
    }
    for name, body in programs.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{body}\n")
        (tmp_path / name).chmod(0o755)
    given = stub | {
        "PATH": f"{tmp_path}:{os.environ['PATH']}",
        "SLURM_JOB_NODELIST": "node-[0-9]",
        "SLURM_JOB_ID": "40007",
        "SLURM_JOB_NUM_NODES": str(nodes),
        "SLURM_SUBMIT_DIR": str(ROOT),
    }
    done = script("slurm.sbatch", "c.yaml", "a=b", environment=given | more)
    if done.returncode:
        return [done.stderr]
    return [line.strip() for line in done.stdout.splitlines()]


def test_sites_of_several_slurm_nodes(stub, tmp_path: Path) -> None:
    found = slurm(stub, tmp_path, 4, NODES_PER_SITE="2", RANKS_PER_NODE="8")
    assert found == [
        f"-m torch.distributed.run --nnodes=2 --node-rank={node % 2} --nproc-per-node=8 "
        f"--master-addr=node-{node // 2 * 2} --master-port=20008 "
        f"-m fomoe train c.yaml a=b --site {node // 2} --meet node-0:20007"
        for node in range(4)
    ]
    found = slurm(stub, tmp_path, 2, SITE="3", MEET="10.8.0.1:29500", RANKS_PER_NODE="4")
    assert found == [
        f"-m torch.distributed.run --nnodes=2 --node-rank={node} --nproc-per-node=4 "
        f"--master-addr=node-0 --master-port=20008 "
        f"-m fomoe train c.yaml a=b --site 3 --meet 10.8.0.1:29500"
        for node in range(2)
    ]
    assert slurm(stub, tmp_path, 3, NODES_PER_SITE="2") == [
        "NODES_PER_SITE 2 does not divide the job's 3 nodes\n"
    ]


def test_the_tiny_experiment_itself_is_right(tmp_path: Path) -> None:
    """Else the refusals above would come for another reason."""
    assert trained(write_config(tmp_path), "rounds=1")["rounds"] == 1
