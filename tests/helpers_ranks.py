"""Sites of several ranks: the processes that torchrun would start, forked from one that has torch.

`python tests/helpers_ranks.py FILE` reads commands, each with its number of ranks and a folder for
what they print, and runs one after the other.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent


@dataclass(frozen=True)
class World:
    """What the ranks of a run left behind, in their order."""

    status: int
    out: list[str]
    err: list[str]
    held: list[dict[str, Any]]

    @property
    def summary(self) -> dict[str, Any]:
        assert self.status == 0, self.err
        return json.loads(self.out[0])


@dataclass(frozen=True)
class Command:
    """`fomoe WORDS...` as so many ranks of one world, or of a world of `ranks` for each site.

    Attributes:
        limit: [bytes] that a rank may use beyond what it has before it starts; 0: no limit.
    """

    folder: Path
    count: int
    words: tuple[object, ...]
    ranks: int = 0
    limit: int = 0


def worlds(*commands: Command, seconds: float = 600.0) -> list[World]:
    """Run commands one after the other; they fail if they hang."""
    file = commands[0].folder.with_suffix(".commands.json")
    file.parent.mkdir(parents=True, exist_ok=True)
    rows = [[str(c.folder), c.count, [*map(str, c.words)], c.ranks, c.limit] for c in commands]
    file.write_text(json.dumps(rows))
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    environment = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": path}
    command = [sys.executable, __file__, str(file)]
    subprocess.run(command, env=os.environ | environment, timeout=seconds, check=True)
    return [
        World(
            int((c.folder / "status").read_text()),
            *(
                [(c.folder / f"{r}.{s}").read_text() for r in range(c.count)]
                for s in ("out", "err")
            ),
            [json.loads(p.read_text()) for p in sorted(c.folder.glob("*.held"))],
        )
        for c in commands
    ]


def forked(count: int, work: Callable[[int], int]) -> int:
    """Run `work` in a process per rank; the first status that is not 0."""
    children = []
    for rank in range(count):
        child = os.fork()
        if child == 0:
            status = 1
            try:
                status = work(rank)
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(status)
        children.append(child)
    return next(filter(None, [os.waitpid(c, 0)[1] >> 8 for c in children]), 0)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _run_all(file: Path) -> None:
    # No parallel region of torch may run before the fork.
    from fomoe.cli import main

    # What every rank imports is imported once.
    for room in ("torch._dynamo", "fomoe.training", "torch.distributed.fsdp", "fomoe.report"):
        import_module(room)
    for folder, count, words, ranks, limit in json.loads(file.read_text()):
        status = _run(main, Path(folder), count, words, ranks, limit)
        (Path(folder) / "status").write_text(str(status))


def _report_held(path: Path) -> None:
    """At the end of training, write what the rank holds: bytes by kind, and the hash of it all."""
    from fomoe import training

    summarize = training.run_rounds

    def run_rounds(run: Any) -> Any:
        summary = summarize(run)
        (site,) = run.sites.values()
        values = list(site.parameters.values())
        inner = [t for state in site.optimizer.state.values() for t in state.values()]
        outer = list(run.sync.state_of(site.site).values())
        hashed = hashlib.sha256()
        for tensor in [*values, *inner]:
            hashed.update(tensor.detach().contiguous().numpy().tobytes())
        held = {
            "parameters": values,
            "gradients": [p.grad for p in values if p.grad is not None],
            "inner_optimizer": inner,
            "outer": outer,
        }
        found = {name: sum(t.nbytes for t in tensors) for name, tensors in held.items()}
        path.write_text(json.dumps(found | {"hash": hashed.hexdigest()}))
        return summary

    training.run_rounds = run_rounds


def _limit_data(room: int) -> None:
    """Let this process's private memory (heap and anonymous mappings) grow by so many bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    (used,) = (int(line.split()[1]) << 10 for line in lines if line.startswith("VmData:"))
    resource.setrlimit(resource.RLIMIT_DATA, (used + room, used + room))


def _run(
    main: Callable[[list[str]], int],
    folder: Path,
    count: int,
    words: list[str],
    ranks: int,
    limit: int,
) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    port = str(_free_port())

    def work(rank: int) -> int:
        for number, name in ((1, "out"), (2, "err")):
            file = os.open(folder / f"{rank}.{name}", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, number)
        _report_held(folder / f"{rank}.held")
        if limit:
            _limit_data(limit)
        if not ranks:
            os.environ |= {"RANK": str(rank), "WORLD_SIZE": str(count), "LOCAL_RANK": str(rank)}
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
            return main(words)
        site, own = divmod(rank, ranks)
        size = min(ranks, count - site * ranks)  # the last site may have fewer
        os.environ |= {"RANK": str(own), "WORLD_SIZE": str(size), "LOCAL_RANK": str(own)}
        return main([*words, "--site", str(site), "--meet", f"127.0.0.1:{port}"])

    return forked(count, work)


if __name__ == "__main__":
    _run_all(Path(sys.argv[1]))
