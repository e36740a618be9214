"""Runs on this machine: each fleet of test hosts has a number, a directory, a lock for life, and a subnet.

A run lives for as long as its supervisor holds the lock; the kernel lets go of it however the supervisor ends. The
directory of a run that is no more, and its link if the kernel has not yet removed it, are cleaned at the next start.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import shutil
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from ipaddress import IPv4Network
from pathlib import Path

from .model import SYSTEM_PATH, TestHostsError

RUNS = Path("/run/canopy-testhosts")

# RFC 2544 sets 198.18.0.0/15 aside for tests between devices.
RANGE = IPv4Network("198.18.0.0/15")
# Room for 2,046 hosts in the lower half and as many VMs in the upper half; 32 fleets fit beside one another.
SUBNET_PREFIX = 20


@dataclass(frozen=True, kw_only=True)
class Run:
    """A run's place: ``lock`` is the descriptor that keeps it alive."""

    number: int
    directory: Path
    lock: int
    subnet: IPv4Network

    @property
    def link(self) -> str:
        return link_name(self.number)


@dataclass(frozen=True, kw_only=True)
class RunSummary:
    """A run as ``list`` shows it."""

    number: int
    alive: bool
    subnet: IPv4Network
    owner: int
    hosts: tuple[str, ...]
    ssh_config: Path


def link_name(number: int) -> str:
    """The link that joins the service node to the fleet's segment; the number makes it the run's own."""
    return f"testhosts{number}"


def _subnet(number: int) -> IPv4Network:
    size = 1 << (32 - SUBNET_PREFIX)
    return IPv4Network((int(RANGE.network_address) + number * size, SUBNET_PREFIX))


@contextlib.contextmanager
def _all_runs_locked() -> Iterator[None]:
    RUNS.mkdir(mode=0o700, parents=True, exist_ok=True)
    descriptor = os.open(RUNS / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _lock_of(directory: Path) -> int | None:
    """The run's lock, taken, where nobody holds it (the run is dead); None where the run is alive."""
    descriptor = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        os.close(descriptor)
        return None
    return descriptor


def _directories() -> list[Path]:
    if not RUNS.is_dir():
        return []
    found = [path for path in RUNS.iterdir() if path.name.isdigit() and path.is_dir()]
    return sorted(found, key=lambda path: int(path.name))


def _delete_link(name: str) -> None:
    if Path("/sys/class/net", name).exists():
        # It may go by itself between the look and the call: the kernel removes a dead namespace's links late.
        subprocess.run(
            ["ip", "link", "delete", name],
            check=False,
            stderr=subprocess.DEVNULL,
            env={"PATH": SYSTEM_PATH},
        )


def _clean_dead_runs() -> list[int]:
    cleaned = []
    for directory in _directories():
        lock = _lock_of(directory)
        if lock is None:
            continue
        _delete_link(link_name(int(directory.name)))
        shutil.rmtree(directory, ignore_errors=True)
        os.close(lock)
        cleaned.append(int(directory.name))
    return cleaned


def clean() -> list[int]:
    """Remove what dead runs left behind; the numbers of those runs. Live runs are not touched."""
    with _all_runs_locked():
        return _clean_dead_runs()


def _addresses_in_use() -> list[IPv4Network]:
    listed = subprocess.run(
        ["ip", "-json", "-4", "address"], check=True, capture_output=True, env={"PATH": SYSTEM_PATH}
    )
    return [
        IPv4Network((address["local"], address["prefixlen"]), strict=False)
        for link in json.loads(listed.stdout)
        for address in link.get("addr_info", [])
        if "local" in address
    ]


def claim() -> tuple[Run, list[int]]:
    """Clean dead runs, then take the lowest free number whose subnet no link of this machine uses.

    Returns the run and the numbers of the dead runs that were cleaned. Raises TestHostsError when all are taken.
    """
    with _all_runs_locked():
        cleaned = _clean_dead_runs()
        in_use = _addresses_in_use()
        for number in range(1 << (SUBNET_PREFIX - RANGE.prefixlen)):
            directory = RUNS / str(number)
            subnet = _subnet(number)
            if directory.exists() or Path("/sys/class/net", link_name(number)).exists():
                continue
            if any(subnet.overlaps(network) for network in in_use):
                continue
            directory.mkdir(mode=0o700)
            lock = _lock_of(directory)
            if lock is None:
                raise TestHostsError(f"{directory} is held by another process: start again")
            return Run(number=number, directory=directory, lock=lock, subnet=subnet), cleaned
    raise TestHostsError(f"all subnets of {RANGE} are in use: end a fleet of test hosts (see 'list')")


def describe(run: Run, *, owner: int, hosts: list[str]) -> None:
    """Write what ``list`` shows: the pid of the process that asked for the hosts, and their names."""
    text = json.dumps({"owner": owner, "hosts": hosts})
    (run.directory / "run.json").write_text(text)


def release(run: Run) -> None:
    """Remove the run's directory and let go of its number."""
    with _all_runs_locked():
        shutil.rmtree(run.directory, ignore_errors=True)
        os.close(run.lock)


def summaries() -> list[RunSummary]:
    """All runs, dead ones too, by number."""
    result = []
    with _all_runs_locked():
        for directory in _directories():
            lock = _lock_of(directory)
            if lock is not None:
                os.close(lock)
            try:
                facts = json.loads((directory / "run.json").read_text())
            except (FileNotFoundError, json.JSONDecodeError):
                facts = {"owner": 0, "hosts": []}
            number = int(directory.name)
            result.append(
                RunSummary(
                    number=number,
                    alive=lock is None,
                    subnet=_subnet(number),
                    owner=facts["owner"],
                    hosts=tuple(facts["hosts"]),
                    ssh_config=directory / "ssh" / "config",
                )
            )
    return result
