"""What an idle agent costs: memory, and CPU over some seconds, by each of the Pythons that it may run on.

python -m tests.bench.idle --seconds 20
"""

from __future__ import annotations

import argparse
import io
import os
import platform
import sys
import tarfile
import tempfile
import time
from pathlib import Path

from controller.bundle import BundleError, Bundles, Platform
from tests.net.localfleet import LocalFleet, local_fleet
from tests.waiting import wait_until

#: What the project promises.
MOST_KIB = 32 * 1024
MOST_CPU = 0.5
_AGENTS = 3
#: From the start on the agents report, are given plans and learn the time; after this they are idle.
_SETTLE_S = 8.0
_HOST_PYTHON = "/usr/bin/python3"


def resident_kib(pid: int) -> int:
    """The resident set (proc_pid_status(5), VmRSS) in KiB."""
    return _kib(Path(f"/proc/{pid}/status"), "VmRSS:")


def proportional_kib(pid: int) -> int:
    """The share of memory in which what several processes share counts once (proc_pid_smaps(5), Pss) in KiB."""
    return _kib(Path(f"/proc/{pid}/smaps_rollup"), "Pss:")


def _kib(file: Path, field: str) -> int:
    for line in file.read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise ValueError(f"{file} has no {field}")


def cpu_seconds(pid: int) -> float:
    """User and system time so far (proc_pid_stat(5), fields 14 and 15)."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def measure(fleet: LocalFleet, seconds: float) -> list[tuple[str, int, int, float]]:
    """For each agent: its name, resident and proportional KiB, and per cent of a core over that many seconds."""
    wait_until(lambda: all(host.health for host in fleet.hosts().values()), 60, "the agents' first reports")
    time.sleep(_SETTLE_S)
    before = {name: cpu_seconds(fleet.pid(name)) for name in fleet.names}
    began = time.monotonic()
    time.sleep(seconds)
    lasted = time.monotonic() - began
    return [
        (
            name,
            resident_kib(pid := fleet.pid(name)),
            proportional_kib(pid),
            100 * (cpu_seconds(pid) - before[name]) / lasted,
        )
        for name in fleet.names
    ]


def unpacked_bundle(into: Path) -> Path:
    """The bundle that a host with the system's Python would get, on disk. Raises BundleError."""
    libc, version = platform.libc_ver(_HOST_PYTHON)
    found = os.popen(f"{_HOST_PYTHON} -c 'import sys; print(*sys.version_info[:2])'").read().split()
    host = Platform(
        python=(int(found[0]), int(found[1])),
        machine=platform.machine(),
        libc=libc,
        libc_version=tuple(map(int, version.split(".")[:2])),  # type: ignore[arg-type]  # two of them
    )
    with tarfile.open(fileobj=io.BytesIO(Bundles().get(host).archive)) as archive:
        archive.extractall(into, filter="data")
    return into


def main() -> int:
    """Measure and print a table. The exit code tells whether the promise holds."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=20.0, help="how long CPU time is counted (default 20)")
    arguments = parser.parse_args()
    kept = True
    print(f"{'python':38} {'agent':6} {'RSS MiB':>8} {'PSS MiB':>8} {'CPU %':>7}")
    with tempfile.TemporaryDirectory() as scratch:
        cases: list[tuple[str, str, Path | None]] = [(sys.executable, "this interpreter", None)]
        try:
            cases.append((_HOST_PYTHON, "the bundle", unpacked_bundle(Path(scratch, "bundle"))))
        except BundleError as error:
            print(f"no bundle: {error}", file=sys.stderr)
        for number, (python, what, path) in enumerate(cases):
            home = Path(scratch, str(number))
            home.mkdir()
            with local_fleet(home, [f"h{rank}" for rank in range(_AGENTS)], 1, python=python, path=path) as fleet:
                for name, rss, pss, cpu in measure(fleet, arguments.seconds):
                    kept &= rss <= MOST_KIB and cpu < MOST_CPU
                    print(f"{f'{what} ({python})'[-38:]:38} {name:6} {rss / 1024:8.1f} {pss / 1024:8.1f} {cpu:7.2f}")
    print(f"at most {MOST_KIB / 1024:g} MiB and {MOST_CPU} % of a core: {'kept' if kept else 'NOT kept'}")
    return 0 if kept else 1


if __name__ == "__main__":
    sys.exit(main())
