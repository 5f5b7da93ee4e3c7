"""Emulated links: what becomes of a packet, and a whole run over them where this user may."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from importlib import util
from pathlib import Path
from types import ModuleType

import pytest

from fomoe_sim.cluster import Cluster, read_cluster

ROOT = Path(__file__).parent.parent

CLUSTER = """
rtt_ms: 20
{common}
shared_uplinks: {{campus: 8Mbit}}
sites:
  - {{name: a, accelerator: H100, count: 1, up: 80Mbit, down: 800Mbit, uplink: campus}}
  - {{name: b, accelerator: H100, count: 1, up: 80Mbit, down: 800Mbit, uplink: campus}}
  - {{name: c, accelerator: H100, count: 1, up: 80Mbit, down: 40Mbit}}
"""


def _load() -> ModuleType:
    spec = util.spec_from_file_location("wan", ROOT / "launch" / "wan.py")
    assert spec is not None
    assert spec.loader is not None
    module = util.module_from_spec(spec)
    sys.modules["wan"] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


wan = _load()


def cluster(tmp_path: Path, common: str = "") -> Cluster:
    path = tmp_path / "cluster.yaml"
    path.write_text(CLUSTER.format(common=common))
    return read_cluster(path)


def test_a_packet_waits_for_each_link_and_half_a_round_trip(tmp_path: Path) -> None:
    network = wan.Network(cluster(tmp_path), queue_s=1.0)
    # c to b: 80 Mbit/s up, campus 8 Mbit/s, 800 Mbit/s down: 1000 bytes take 0.1, 1 and 0.01 ms.
    first = network.arrival(2, 1, 1000, 5.0)
    assert first == pytest.approx(5.0 + 0.0001 + 0.001 + 0.00001 + 0.010)
    # The second leaves c's link 0.1 ms after the first, and then waits for the campus's.
    second = network.arrival(2, 1, 1000, 5.0)
    assert second == pytest.approx(5.0 + 0.0001 + 0.002 + 0.00001 + 0.010)
    # The way to c shares neither link: 80 Mbit/s, campus up, 40 Mbit/s down.
    back = network.arrival(0, 2, 1000, 5.0)
    assert back == pytest.approx(5.0 + 0.0001 + 0.001 + 0.0002 + 0.010)


def test_a_full_queue_drops(tmp_path: Path) -> None:
    network = wan.Network(cluster(tmp_path), queue_s=0.0105)
    # The campus's link takes 1 ms a packet, so the twelfth would wait 11 ms less 1.1 ms on c's.
    times = [network.arrival(2, 1, 1000, 0.0) for _ in range(14)]
    assert [at is None for at in times] == [False] * 12 + [True] * 2
    assert network.dropped == 2


def test_loss_and_jitter_are_the_file_s(tmp_path: Path) -> None:
    found = cluster(tmp_path, "loss: 0.1\njitter_ms: 5")
    network = wan.Network(found, queue_s=1.0)
    delays = []
    for number in range(4000):
        at = network.arrival(0, 2, 100, float(number))
        if at is not None:
            delays.append(at - number)
    assert 4000 - len(delays) == network.lost
    assert 330 < network.lost < 470  # 400 expected, standard deviation 19
    on_links = 0.00001 + 0.0001 + 0.00002
    assert min(delays) == pytest.approx(0.005 + on_links, abs=2e-4)
    assert max(delays) == pytest.approx(0.015 + on_links, abs=2e-4)


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["none.yaml", "c.yaml"], "none.yaml does not exist"),
        (["--mtu", "100", "{cluster}", "c.yaml"], "--mtu 100 must be from 576 to 65535"),
        (["--queue-ms", "0", "{cluster}", "c.yaml"], "--queue-ms 0.0 must be above 0"),
        (["{cluster}", "none.yaml"], "none.yaml"),
        (["{cluster}", "{config}", "num_sites=4"], "num_sites 4 must be 3, the sites of"),
    ],
)
def test_mistakes_are_one_line(words: list[str], said: str, tmp_path: Path) -> None:
    if os.geteuid() != 0 and "none" not in said and "--" not in said:
        pytest.skip("asks for root first")
    cluster(tmp_path)
    names = {"cluster": tmp_path / "cluster.yaml", "config": ROOT / "configs" / "quickstart.yaml"}
    done = _start([word.format(**names) for word in words])
    assert done.returncode != 0
    (line,) = done.stderr.splitlines()
    assert said in line


def _start(words: list[str], timeout: int = 120) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": sys.executable}
    command = [str(ROOT / "launch" / "wan.sh"), *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=timeout)


def _namespaces() -> set[str]:
    done = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, check=True)
    return {line.split()[0] for line in done.stdout.splitlines()}


def _may_emulate() -> bool:
    if os.geteuid() != 0 or shutil.which("ip") is None or not os.path.exists("/dev/net/tun"):
        return False
    name = f"fomoe-try-{os.getpid()}"
    done = subprocess.run(["ip", "netns", "add", name], capture_output=True)
    subprocess.run(["ip", "netns", "delete", name], capture_output=True)
    return done.returncode == 0


@pytest.mark.skipif(not _may_emulate(), reason="network namespaces and TUN need root")
def test_a_run_over_emulated_links(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its interfaces send what the run counted, and headers; the loss is that of one process."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # the proxy sums in the order of a site then
    links = tmp_path / "two.yaml"
    links.write_text(
        "rtt_ms: 4\nsites:\n"
        "  - {name: a, accelerator: H100, count: 1, link: 200Mbit}\n"
        "  - {name: b, accelerator: H100, count: 1, link: 100Mbit}\n"
    )
    config = str(ROOT / "configs" / "quickstart.yaml")
    small = ["num_sites=2", "placement.replication_factor=1", "rounds=2", "local_steps=2"]
    small += ["model.num_layers=1", "model.num_experts=4", "inner.batch_size=2"]
    small += ["data.seq_len=64", "data.held_out_sequences=2"]
    before = _namespaces()
    done = _start([str(links), config, *small, f"run.dir={tmp_path / 'wan'}"])
    assert done.returncode == 0, done.stderr
    assert "by a relay in user space: 4 ms there and back" in done.stdout
    found = re.findall(r"run counted ([\d,]+) bytes sent, its interface ([\d,]+)", done.stdout)
    counts = [tuple(int(word.replace(",", "")) for word in pair) for pair in found]
    assert len(counts) == 2
    for counted, sent in counts:
        assert 0 < counted < sent < 1.2 * counted + 100_000  # small messages have much to carry
    proxy = [sys.executable, "-m", "fomoe", "train", config, *small]
    subprocess.run([*proxy, f"run.dir={tmp_path / 'proxy'}"], check=True, capture_output=True)
    losses = [
        json.loads((tmp_path / name / "summary.json").read_text())["val_loss_merged"]
        for name in ("wan", "proxy")
    ]
    assert losses[0] == losses[1]
    assert _namespaces() <= before
