"""Build the wheel, install it in a clean environment, and use it there: `make package`.

The environment sees the standard library, the wheel, and the packages that its metadata requires,
which are linked from this environment, so nothing is downloaded and an undeclared import is
noticed. With `--from-index` pip installs them as for anyone else.
"""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parent.parent
SOURCES = ("setup.py", "pyproject.toml", "README.md", "LICENSE", "fomoe", "sim", "configs")
TINY = ["rounds=1", "local_steps=1", "data.seq_len=16", "data.held_out_sequences=4"]
COMMANDS = (
    ["fomoe", "--version"],
    ["fomoe", "train", "quickstart", "--dry-run", "--json"],
    ["fomoe", "train", "quickstart", *TINY],
    ["fomoe", "merge", "runs/quickstart"],
    ["fomoe", "options", "outer"],
    ["fomoe", "project", "--model", "deepseek-v3", "--sites", "8"],
    ["python", "-c", "import fomoe; print(fomoe.load_config('quickstart').num_sites)"],
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--from-index", action="store_true", help="let pip fetch what is required")
    parser.add_argument("--constraint", help="a constraints file for pip")
    args = parser.parse_args()
    wheel = build(ROOT / "dist")
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        venv.create(place / "env", with_pip=True)
        python = place / "env" / "bin" / "python"
        install = [python, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
        if args.from_index:
            extra = ["--constraint", args.constraint] if args.constraint else []
            run([*install, *extra, wheel], place)
        else:
            run([*install, "--no-index", "--no-deps", wheel], place)
            (site_packages,) = (place / "env" / "lib").glob("python*/site-packages")
            link_required(site_packages)
        run([python, "-m", "pip", "check", "--disable-pip-version-check"], place)
        for program, *words in COMMANDS:
            print(f"== {program} {' '.join(words)}", flush=True)
            run([place / "env" / "bin" / program, *words], place)
    print(f"{wheel.relative_to(ROOT)} works in a clean environment")


def build(out: Path) -> Path:
    """Build from a copy, so that nothing of an earlier build gets into the wheel."""
    with tempfile.TemporaryDirectory() as folder:
        source = Path(folder)
        for name in SOURCES:
            if (ROOT / name).is_dir():
                skip = shutil.ignore_patterns("__pycache__")
                shutil.copytree(ROOT / name, source / name, ignore=skip)
            else:
                shutil.copy(ROOT / name, source / name)
        words = ["pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
        # From this version on setuptools needs no other package to build a wheel.
        if tuple(map(int, metadata.version("setuptools").split(".")[:2])) >= (70, 1):
            words.append("--no-build-isolation")
        run([sys.executable, "-m", *words, "--wheel-dir", out, source], source)
    return max(out.glob("fomoe-*.whl"), key=lambda path: path.stat().st_mtime_ns)


def link_required(site_packages: Path) -> None:
    """Link what the wheel requires, and what that requires, from this environment."""
    (own,) = metadata.distributions(name="fomoe", path=[str(site_packages)])
    todo, done = list(required(own)), set()
    while todo:
        name = todo.pop()
        if name in done:
            continue
        done.add(name)
        found = metadata.distribution(name)
        todo += required(found)
        tops = {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "/")}
        for top in tops - {"__pycache__"}:
            link = site_packages / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))).resolve())


def required(found: metadata.Distribution) -> Iterator[str]:
    """Names that a distribution requires here; extras and other platforms are left out."""
    from packaging.requirements import Requirement

    for line in found.requires or ():
        requirement = Requirement(line)
        if requirement.marker is None or requirement.marker.evaluate({"extra": ""}):
            yield re.sub(r"[-_.]+", "-", requirement.name).lower()


def run(words: list[object], folder: Path) -> None:
    subprocess.run([str(word) for word in words], cwd=folder, check=True)


if __name__ == "__main__":
    main()
