"""`ctl broadcast` beside pdsh, clush and TakTuk, on the same test hosts in one run; and figures of ours alone.

    python -m tests.bench.broadcast [--hosts 64,256] [--rounds 5] [--only race,seq,flood,slow,clients] [--mb 16]

race     `hostname`, whole processes and in a Session, side by side: every round runs each contestant once, so that all
         meet the same state of the machine; medians, and ratios to ours
seq      `seq 1 20000` on every host, gathered: all outputs equal, and all different
flood    --mb MB of different text from every host, streamed
slow     a flood of one host into a client that reads slowly, while others run commands
clients  100 clients at once, each with a command for all hosts

All hosts share this machine's cores: sshd's work counts for the others as the agents' does for us. "service node" is
the CPU time of the client and its children, and for us that of the service during the call as well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import psutil

from controller.session import Piece, Session
from controller.up import UpOptions, down, up
from deploy.testhosts import HostSpec, TestHosts

COMMAND = "hostname"
OURS, IN_SESSION = "ctl broadcast", "open Session"
PARTS = ("race", "seq", "flood", "slow", "clients")


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
    parser.add_argument("--hosts", default="64,256", help="how many, one run after the other")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", default=",".join(PARTS), help="which parts")
    parser.add_argument("--mb", type=int, default=16, help="MB of text from each host in the flood")
    arguments = parser.parse_args()
    parts = arguments.only.split(",")
    if unknown := [part for part in parts if part not in PARTS]:
        parser.error(f"no such part: {', '.join(unknown)}; there are {', '.join(PARTS)}")
    missing = [tool for tool in ("pdsh", "clush", "taktuk") if shutil.which(tool) is None]
    if "race" in parts and missing:
        print(f"not installed, and left out: {', '.join(missing)}; `make bench-broadcast` installs them")
    for hosts in map(int, arguments.hosts.split(",")):
        _bench(hosts, arguments.rounds, parts, arguments.mb)
    return 0


def _bench(hosts: int, rounds: int, parts: list[str], mb: int) -> None:
    names = [f"h{number}" for number in range(hosts)]
    with tempfile.TemporaryDirectory() as home, TestHosts([HostSpec(name) for name in names]) as fleet:
        os.environ["CANOPY_HOME"] = home
        report = up(UpOptions(hosts=tuple(names), ssh_config=Path(fleet.ssh_config)))
        if report.failed:
            raise SystemExit(f"not up: {report.failed}")
        try:
            with Session() as session:
                for part in parts:
                    if part == "race":
                        _compete(hosts, rounds, Path(fleet.ssh_config))
                    elif part == "seq":
                        _seq(session, hosts, rounds)
                    elif part == "flood":
                        _flood(session, hosts, mb)
                    elif part == "slow":
                        _slow(session)
                    else:
                        _clients(session, hosts)
        finally:
            down(None, purge=True)


def _agents(fleet: str) -> list[psutil.Process]:
    """The agents of this fleet, as this machine sees them: each has a directory of the fleet's name."""
    found = []
    for process in psutil.process_iter(["cmdline"]):
        line = process.info["cmdline"] or []
        if line[1:4] == ["-m", "agent", "run"] and any(Path(word).name == fleet for word in line):
            found.append(process)
    return found


class _Peak:
    """The largest resident set of the service and of any agent while it is entered, in MiB."""

    def __init__(self, session: Session) -> None:
        status = session.status()
        self._service = psutil.Process(status.pid)
        agents = _agents(status.fleet)
        if len(agents) != len(status.hosts):
            raise SystemExit(f"{len(agents)} agents' processes are seen, of {len(status.hosts)}")
        self._watched = [self._service, *agents]
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self.service = self.agents = 0.0

    def _watch(self) -> None:
        while not self._over.wait(0.25):
            for process in self._watched:
                size = process.memory_info().rss / 2**20
                if process is self._service:
                    self.service = max(self.service, size)
                else:
                    self.agents = max(self.agents, size)

    def __enter__(self) -> _Peak:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def __str__(self) -> str:
        return f"largest RSS: service {self.service:.0f} MiB, agent {self.agents:.0f} MiB"


def _seq(session: Session, hosts: int, rounds: int) -> None:
    for name, command in (
        ("all equal", "seq 1 20000"),
        ("all different", "echo $(hostname); seq 1 20000"),
    ):
        walls = []
        for _ in range(rounds):
            began = time.perf_counter()
            results = session.run(command).results()
            walls.append(time.perf_counter() - began)
            if sum(len(result.hosts) for result in results if result.ok) != hosts:
                raise SystemExit(f"seq: {results}")
        print(f"seq 1 20000 on {hosts} hosts, gathered, {name}: {statistics.median(walls):.3f} s (median of {rounds})")


def _flood(session: Session, hosts: int, mb: int) -> None:
    # Text that nothing compresses and that differs by host; sixteen digits and a line's end for each eight bytes.
    source = f"head -c {mb * 10**6 // 17 * 8} /dev/urandom | od -An -v -tx8 -w8"
    digest, count = hashlib.sha256(), 0
    with _Peak(session) as peak:
        began, cpu = time.perf_counter(), time.process_time()
        for happening in session.run(source, stream=True):
            if isinstance(happening, Piece):
                digest.update(happening.data)
                count += len(happening.data)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    print(
        f"flood: {count / 1e6:.0f} MB of text from {hosts} hosts in {wall:.2f} s, {count / 1e6 / wall:.0f} MB/s; "
        f"the client needs {cpu:.2f} s of CPU with its hashing; {peak}"
    )


def _slow(session: Session) -> None:
    def others() -> float:
        walls = []
        for _ in range(20):
            began = time.perf_counter()
            session.run("true").results()
            walls.append(time.perf_counter() - began)
        return statistics.median(walls)

    alone = others()
    with _Peak(session) as peak:
        job = session.run("head -c 1000000000 /dev/zero", ["h0"], stream=True)
        reading, taken, over = iter(job), 0, threading.Event()

        def read() -> None:
            nonlocal taken
            for happening in reading:
                if isinstance(happening, Piece):
                    taken += len(happening.data)
                if over.wait(0.05):
                    return

        thread = threading.Thread(target=read)
        thread.start()
        beside = others()
        time.sleep(3)
        over.set()
        thread.join()
        job.close()
    print(
        f"slow: {taken / 1e6:.1f} MB taken of 1 GB; `true` on all hosts takes {beside:.3f} s beside it and "
        f"{alone:.3f} s alone; {peak}"
    )


def _clients(session: Session, hosts: int) -> None:
    found: list[int] = []

    def one() -> None:
        found.append(sum(len(result.hosts) for result in Session().run("true").results() if result.ok))

    with _Peak(session) as peak:
        threads = [threading.Thread(target=one) for _ in range(100)]
        began = time.perf_counter()
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        wall = time.perf_counter() - began
    if found != [hosts] * 100:
        raise SystemExit(f"clients: {found}")
    print(f"clients: 100 clients at once to {hosts} hosts, all complete in {wall:.2f} s; {peak}")


def _compete(hosts: int, rounds: int, ssh_config: Path) -> None:
    session = Session()
    service = psutil.Process(session.status().pid)
    everybody = f"h[0-{hosts - 1}]"
    environment = dict(os.environ) | {"PDSH_SSH_ARGS_APPEND": f"-F {ssh_config}"}
    ctl = str(Path(sys.executable).with_name("ctl"))
    options = f"-F {ssh_config}"
    rows = [
        Row(
            OURS,
            lambda: _names(
                subprocess.run([ctl, "broadcast", "--json", COMMAND], capture_output=True, text=True, check=True).stdout
            ),
            [],
            [],
        ),
        Row(IN_SESSION, lambda: sum(len(result.hosts) for result in session.run(COMMAND).results()), [], []),
        Row("pdsh -f 64", lambda: _pdsh(everybody, environment), [], []),
        Row(
            "clush -f 64",
            lambda: _lines(["clush", "-N", "-f", "64", "-w", everybody, "-o", options, COMMAND], environment),
            [],
            [],
        ),
        Row("taktuk", lambda: _taktuk(hosts, options), [], []),
    ]
    rows = [row for row in rows if shutil.which(row.name.split()[0]) or row.name in (OURS, IN_SESSION)]
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


def _taktuk(hosts: int, options: str) -> int:
    machines = [word for number in range(hosts) for word in ("-m", f"h{number}")]
    argv = ["taktuk", "-o", 'output="$line\\n"', "-o", "status", "-o", "connector", "-c", f"ssh {options}", *machines]
    return _lines([*argv, "broadcast", "exec", "[", COMMAND, "]"], dict(os.environ))


def _names(output: str) -> int:
    import json

    return sum(len(fold["hosts"]) for fold in json.loads(output))


if __name__ == "__main__":
    sys.exit(main())
