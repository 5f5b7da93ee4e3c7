"""The launch environment: which site this process belongs to, and where the sites join.

torchrun, `launch/site.sh` and `launch/slurm.sbatch` set RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR
and MASTER_PORT. Everything is checked before any wait (no torch here): with a wrong number the
other sites would wait for a site that never comes.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fomoe.errors import ConfigError

_PORT = 29500
_PROXY = "this is a proxy run, which trains all sites in every process that is started"
_USE = "for a distributed run, start one process per site with torchrun or launch/*.sh"
_SLURM = "for a distributed run, use launch/slurm.sbatch or set them per task"


@dataclass(frozen=True, kw_only=True)
class Launch:
    """The role of this process in a distributed run: launch arguments, never config.

    Attributes:
        site, num_sites: this site and the number of sites; (0, 1) for a proxy run.
        rank, ranks: which of the site's processes this is, and their number.
        local_rank: index on this machine, which chooses the accelerator.
        address, port: of the store through which the sites join: site 0's, or torchrun's.
        agent_store: whether torchrun's agent runs the store, so that site 0 does not.
        attempt: how often torchrun has restarted the sites.
        warning: one line if this is a proxy run although the environment looks like a
            distributed launch.
    """

    site: int = 0
    num_sites: int = 1
    rank: int = 0
    ranks: int = 1
    local_rank: int = 0
    address: str = ""
    port: int = 0
    agent_store: bool = False
    attempt: str = "0"
    warning: str = ""

    @property
    def distributed(self) -> bool:
        return self.num_sites > 1 or self.ranks > 1

    @property
    def first(self) -> bool:
        """Whether this process speaks for the run."""
        return self.site == self.rank == 0

    @property
    def where(self) -> str:
        """Address and port of the store, as a user writes them."""
        host = f"[{self.address}]" if ":" in self.address else self.address
        return f"{host}:{self.port}"


def launch_from_environment(
    environment: Mapping[str, str] | None = None,
    *,
    num_sites: int | None = None,
    ranks: Sequence[int] = (1,),
) -> Launch:
    """Read and check the variables that a launcher sets; without them the run is a proxy run.

    Args:
        environment: the process's own by default.
        num_sites: number of sites of the experiment; as many must have been started.
        ranks: processes of every site, or of each; the ranks of a site follow one another.

    Raises:
        ConfigError: naming the variable, its value and the rule.
    """
    given = os.environ if environment is None else environment
    shown = ",".join(map(str, ranks))
    if num_sites is not None:
        check_ranks_per_site(ranks, num_sites)
    if max(ranks) > 1 and not {"RANK", "WORLD_SIZE"} <= given.keys():
        rule = "needs a process per rank: start it with torchrun (see README)"
        raise ConfigError("--ranks-per-site", shown, rule)
    if "RANK" not in given or "WORLD_SIZE" not in given:
        return Launch(warning=_looks_distributed(given))
    rank, world_size = _integer(given, "RANK"), _integer(given, "WORLD_SIZE")
    local_rank = _integer(given, "LOCAL_RANK") if "LOCAL_RANK" in given else 0
    if world_size < 1:
        raise ConfigError("WORLD_SIZE", world_size, "must be at least 1")
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= value < world_size:
            rule = f"must be from 0 to {world_size - 1}: WORLD_SIZE is {world_size}"
            raise ConfigError(name, value, rule)
    if world_size == 1 and max(ranks) == 1:
        alone = f"WORLD_SIZE is 1 but num_sites is {num_sites}: {_PROXY}; {_USE}"
        return Launch(warning=alone if num_sites not in (None, 1) else "")
    of_sites = list(ranks) if len(ranks) > 1 else [*ranks] * (num_sites or world_size // ranks[0])
    if num_sites is not None and world_size != sum(of_sites):
        rule = f"must equal num_sites, which is {num_sites}: start one process per site"
        if len(ranks) > 1:
            rule = f"must be the sum of --ranks-per-site {shown}, which is {sum(of_sites)}"
        elif max(ranks) > 1:
            rule = f"must be num_sites x --ranks-per-site = {num_sites} x {shown}"
        raise ConfigError("WORLD_SIZE", world_size, rule)
    address = given.get("MASTER_ADDR", "").strip()
    if not address:
        raise ConfigError("MASTER_ADDR", "", f"must be set to site 0's address; {_USE}")
    if not given.get("MASTER_PORT", "").strip():
        raise ConfigError("MASTER_PORT", "", f"must be set to a port of site 0; {_USE}")
    port = _integer(given, "MASTER_PORT")
    if not 1 <= port <= 65535:
        raise ConfigError("MASTER_PORT", port, "must be from 1 to 65535")
    site, own_rank = divide_rank(rank, of_sites)
    return Launch(
        site=site,
        num_sites=len(of_sites),
        rank=own_rank,
        ranks=of_sites[site],
        local_rank=local_rank,
        address=address,
        port=port,
        agent_store=given.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        attempt=given.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def divide_rank(rank: int, of_sites: Sequence[int]) -> tuple[int, int]:
    """The site of a process of one torchrun over all sites, and its rank there.

    Args:
        rank: of the process; one beyond the last site's is of a site that does not exist.
        of_sites: how many ranks each site has.
    """
    for site, number in enumerate(of_sites):
        if rank < number:
            return site, rank
        rank -= number
    return len(of_sites), rank


def check_ranks_per_site(ranks: Sequence[int], num_sites: int) -> None:
    """Check `--ranks-per-site` itself.

    Raises:
        ConfigError: if it has no number for every site.
    """
    shown = ",".join(map(str, ranks))
    if min(ranks) < 1:
        raise ConfigError("--ranks-per-site", shown, "must be at least 1")
    if len(ranks) not in (1, num_sites):
        rule = f"must be one number, or one for each site: num_sites is {num_sites}"
        raise ConfigError("--ranks-per-site", shown, rule)


def launch_of_site(
    site: int,
    meet: str,
    environment: Mapping[str, str] | None = None,
    *,
    num_sites: int,
) -> Launch:
    """The role of this process where every site has a torchrun of its own, or none.

    Args:
        site: this site.
        meet: address, and port if it is not 29500, where the sites join: site 0's.
        environment: the process's own by default; RANK and WORLD_SIZE are those of the site.
        num_sites: number of sites of the experiment.

    Raises:
        ConfigError: naming the argument or the variable, its value and the rule.
    """
    given = os.environ if environment is None else environment
    if not 0 <= site < num_sites:
        rule = f"must be from 0 to {num_sites - 1}: num_sites is {num_sites}"
        raise ConfigError("--site", site, rule)
    rank, ranks, local_rank = (
        _integer(given, name) if name in given else default
        for name, default in (("RANK", 0), ("WORLD_SIZE", 1), ("LOCAL_RANK", 0))
    )
    for name, value in (("RANK", rank), ("LOCAL_RANK", local_rank)):
        if not 0 <= value < ranks:
            rule = f"must be from 0 to {ranks - 1}: WORLD_SIZE is {ranks}"
            raise ConfigError(name, value, rule)
    match = re.fullmatch(r"(\[[^][]+\]|[^][:]+)(?::([0-9]{1,5}))?", meet.strip())
    if match is None:
        rule = "must be an address and a port, as in 10.8.0.1:29500 or [fd00::1]:29500"
        raise ConfigError("--meet", repr(meet), rule)
    port = int(match[2] or _PORT)
    if not 1 <= port <= 65535:
        raise ConfigError("--meet", meet, "must have a port from 1 to 65535")
    return Launch(
        site=site,
        num_sites=num_sites,
        rank=rank,
        ranks=ranks,
        local_rank=local_rank,
        address=match[1].strip("[]"),
        port=port,
        attempt=given.get("TORCHELASTIC_RESTART_COUNT", "0"),
    )


def site_label(ranks: Sequence[int] = (1,), site: int | None = None) -> str:
    """Names this site of a distributed run in a line on stderr; empty in a proxy run."""
    try:
        if site is None:
            launch = launch_from_environment(ranks=ranks)
        else:
            launch = launch_of_site(site, "here", num_sites=site + 1)
    except ConfigError:
        return ""
    rank = f", rank {launch.rank}" if launch.ranks > 1 else ""
    distributed = launch.distributed or site is not None
    return f" (site {launch.site}{rank})" if distributed else ""


def _integer(given: Mapping[str, str], name: str) -> int:
    text = given[name].strip()
    if not re.fullmatch(r"-?[0-9]{1,9}", text):
        raise ConfigError(name, repr(text), "must be an integer, as torchrun sets it")
    return int(text)


def _looks_distributed(given: Mapping[str, str]) -> str:
    """Why this proxy run may be meant as a distributed one; empty if nothing suggests it."""
    for name, other in (("RANK", "WORLD_SIZE"), ("WORLD_SIZE", "RANK")):
        if name in given:
            return f"{name} is set to {given[name]!r} but {other} is not: {_PROXY}; {_USE}"
    tasks = given.get("SLURM_NTASKS", "")
    if "SLURM_PROCID" in given and tasks.isdecimal() and int(tasks) > 1:
        return f"Slurm runs {tasks} tasks but RANK and WORLD_SIZE are not set: {_PROXY}; {_SLURM}"
    return ""
