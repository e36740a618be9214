"""`ctl broadcast hostname` beside `pdsh -f 64` and `clush -f 64`, on the same test hosts in the same run.

    python -m tests.bench.broadcast [--hosts 64] [--rounds 5]

Every round runs each contestant once, so that all meet the same state of the machine; medians are printed, and ratios
to ours. All hosts share this machine's cores: sshd's work counts for pdsh and clush as the agents' does for us.
"service node" is the CPU time of the client and its children, and for us that of the service during the call as well.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from controller.session import Session
from controller.up import UpOptions, down, up
from deploy.testhosts import HostSpec, TestHosts

COMMAND = "hostname"


@dataclass
class Row:
    """One contestant's rounds: seconds of wall clock, and of CPU on the service node."""

    name: str
    once: Callable[[], int]
    walls: list[float]
    cpus: list[float]

    def measure(self, hosts: int, service: psutil.Process) -> None:
        """Run it once; it must have heard from every host."""
        before, service_before = _children_cpu(), _cpu(service)
        began = time.perf_counter()
        heard = self.once()
        self.walls.append(time.perf_counter() - began)
        self.cpus.append(_children_cpu() - before + _cpu(service) - service_before)
        if heard != hosts:
            raise SystemExit(f"{self.name} heard from {heard} of {hosts} hosts")


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime + own.ru_utime + own.ru_stime


def _cpu(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


def _lines(argv: list[str], environment: dict[str, str]) -> int:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    return len(set(done.stdout.split()))


def main() -> int:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--hosts", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    missing = [tool for tool in ("pdsh", "clush") if shutil.which(tool) is None]
    if missing:
        print(f"not installed: {', '.join(missing)}; `make bench-broadcast` installs them", file=sys.stderr)
        return 1
    names = [f"h{number}" for number in range(arguments.hosts)]
    with tempfile.TemporaryDirectory() as home, TestHosts([HostSpec(name) for name in names]) as fleet:
        os.environ["CANOPY_HOME"] = home
        report = up(UpOptions(hosts=tuple(names), ssh_config=Path(fleet.ssh_config)))
        if report.failed:
            raise SystemExit(f"not up: {report.failed}")
        try:
            _compete(arguments.hosts, arguments.rounds, Path(fleet.ssh_config))
        finally:
            down(None, purge=True)
    return 0


def _compete(hosts: int, rounds: int, ssh_config: Path) -> None:
    session = Session()
    service = psutil.Process(session.status().pid)
    everybody = f"h[0-{hosts - 1}]"
    environment = dict(os.environ) | {"PDSH_SSH_ARGS_APPEND": f"-F {ssh_config}"}
    ctl = str(Path(sys.executable).with_name("ctl"))
    options = f"-F {ssh_config}"
    rows = [
        Row(
            "ctl broadcast",
            lambda: _names(
                subprocess.run([ctl, "broadcast", "--json", COMMAND], capture_output=True, text=True, check=True).stdout
            ),
            [],
            [],
        ),
        Row("open Session", lambda: sum(len(result.hosts) for result in session.run(COMMAND).results()), [], []),
        Row("pdsh -f 64", lambda: _pdsh(everybody, environment), [], []),
        Row(
            "clush -f 64",
            lambda: _lines(["clush", "-N", "-f", "64", "-w", everybody, "-o", options, COMMAND], environment),
            [],
            [],
        ),
    ]
    for number in range(rounds + 1):
        for row in rows:
            row.measure(hosts, service)
            if number == 0:  # a first round for caches: not counted
                row.walls.clear()
                row.cpus.clear()
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{COMMAND} on {hosts} test hosts, median of {rounds} rounds, load average {load:.1f}, {cores} cores")
    print(
        f"{'':16}{'wall s':>9}{'min':>8}{'max':>8}{'service node CPU s':>20}"
        f"   times ctl's wall, CPU; times Session's wall, CPU"
    )
    walls = [statistics.median(row.walls) for row in rows]
    cpus = [statistics.median(row.cpus) for row in rows]
    for row, wall, cpu in zip(rows, walls, cpus, strict=True):
        print(
            f"{row.name:16}{wall:9.3f}{min(row.walls):8.3f}{max(row.walls):8.3f}{cpu:20.3f}"
            f"   {wall / walls[0]:6.1f} {cpu / cpus[0]:6.1f} {wall / walls[1]:9.1f} {cpu / cpus[1]:6.1f}"
        )


def _pdsh(everybody: str, environment: dict[str, str]) -> int:
    argv = ["pdsh", "-N", "-R", "ssh", "-f", "64", "-w", everybody, COMMAND]
    return _lines(argv, environment)


def _names(output: str) -> int:
    import json

    return sum(len(fold["hosts"]) for fold in json.loads(output))


if __name__ == "__main__":
    sys.exit(main())
