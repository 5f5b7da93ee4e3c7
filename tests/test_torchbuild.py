"""Which build of torch `make install` asks pip for; nothing here leaves the machine."""

from __future__ import annotations

import http.server
import re
import socket
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

import torchbuild

ROOT = Path(__file__).parent.parent


@pytest.fixture
def no_proxy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("no_proxy", "127.0.0.1")


@pytest.fixture
def page(no_proxy: None) -> Iterator[str]:
    """A page on this machine; /missing is not there."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(404 if self.path == "/missing" else 200)
            self.end_headers()

        def log_message(self, *args: object) -> None:
            pass

    with http.server.HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()


@pytest.mark.parametrize(
    ("names", "there"),
    [
        ([], False),
        (["null", "nvram", "nvme0"], False),
        (["nvidiactl", "nvidia-uvm"], False),  # a driver without a device
        (["nvidia0", "nvidiactl"], True),
        (["kfd"], True),
        (["dxg"], True),
    ],
)
def test_an_accelerator_is_a_device_of_its_driver(
    tmp_path: Path, names: list[str], there: bool
) -> None:
    for name in names:
        (tmp_path / name).touch()
    assert torchbuild.has_accelerator(tmp_path) is there


def test_a_page_that_is_served_is_found_and_a_missing_one_is_not(page: str) -> None:
    assert torchbuild.answers(f"{page}/torch/")
    assert not torchbuild.answers(f"{page}/missing")


def test_a_closed_port_is_not_waited_for(no_proxy: None) -> None:
    with socket.socket() as held:
        held.bind(("127.0.0.1", 0))  # nobody listens
        assert not torchbuild.answers(f"http://127.0.0.1:{held.getsockname()[1]}/", wait_s=3600)


def test_a_host_that_says_nothing_is_left_alone(
    monkeypatch: pytest.MonkeyPatch, no_proxy: None
) -> None:
    """Neither one that takes the connection, nor one whose look-up does not end."""
    with socket.create_server(("127.0.0.1", 0)) as silent:
        assert not torchbuild.answers(f"http://127.0.0.1:{silent.getsockname()[1]}/", wait_s=0.1)
    ended = threading.Event()

    def look_up(*args: object, **kwargs: object) -> None:
        ended.wait(60)
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", look_up)
    assert not torchbuild.answers("http://127.0.0.1:1/", wait_s=0.1)
    ended.set()


def test_the_options_for_pip() -> None:
    both = ["--constraint", "constraints-cpu.txt", "--extra-index-url", torchbuild.SMALL_BUILDS]
    assert torchbuild.pip_options(small=False, reachable=False) == ([], "")
    assert torchbuild.pip_options(small=True, reachable=True) == (both, "")
    options, line = torchbuild.pip_options(small=True, reachable=False)
    assert options == both[:2]
    assert torchbuild.SMALL_BUILDS in line
    assert "\n" not in line


def test_make_hands_cpu_on_and_pip_gets_the_options() -> None:
    dry = subprocess.run(
        ["make", "--dry-run", "--always-make", "CPU=0", "install"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    ).stdout
    assert re.search(r"options=\$\(\.venv/bin/python torchbuild\.py '0'\) && .* \$options -e", dry)


def test_the_command_line() -> None:
    def run(word: str) -> subprocess.CompletedProcess[str]:
        words = [sys.executable, ROOT / "torchbuild.py", word]
        return subprocess.run(words, capture_output=True, text=True)

    ended = run("0")
    assert (ended.returncode, ended.stdout.strip(), ended.stderr) == (0, "", "")
    ended = run("yes")
    assert ended.returncode != 0
    assert ended.stderr.startswith("CPU=yes is not known")
    assert ended.stderr.count("\n") == 1


def test_the_small_build_fits_the_package() -> None:
    """A constraint outside of setup.py's range could never be met."""
    required = re.search(r'"torch>=(\d+)\.(\d+),<', (ROOT / "setup.py").read_text())
    newest = re.search(r"^torch<(\d+)\.(\d+)$", (ROOT / "constraints-cpu.txt").read_text(), re.M)
    assert required is not None
    assert newest is not None
    assert [int(n) for n in newest.groups()] > [int(n) for n in required.groups()]
