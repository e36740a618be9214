"""`ctl broadcast` beside pdsh, clush and TakTuk, on the same test hosts in one run; and figures of ours alone.

    python -m tests.bench.broadcast [--hosts 64,256] [--rounds 5] [--only true,race,seq,flood,slow,clients] [--mb 16]

true     `true`, as a whole process and in a Session, and how long ctl takes to start; and who pays for it in CPU time
race     `hostname`, whole processes and in a Session, side by side: every round runs each contestant once, so that all
         meet the same state of the machine; medians, and ratios to ours
seq      `seq 1 20000` on every host, gathered: all outputs equal, and all different
flood    --mb MB of different text from every host, streamed
slow     a flood of one host into a client that reads slowly, while others run commands
clients  100 clients at once, each with a command for all hosts

All hosts share this machine's cores: sshd's work counts for the others as the agents' does for us. "service node" is
the CPU time of the client and its children, and for us that of the service during the call as well; "memory" is
the most that the client and its children took together in a round that is not timed, and for us with the service's.
ctl runs from this checkout's own environment: one that is made for users, without what only development needs, starts a
millisecond sooner.
"""

from __future__ import annotations

import argparse
import compileall
import hashlib
import os
import re
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
from tests.bench.cost import Peaks, TreeMemory, cpu_by_thread

COMMAND = "hostname"
OURS, IN_SESSION = "ctl broadcast", "open Session"
_CPU_ROUNDS = 25
PARTS = ("true", "race", "seq", "flood", "slow", "clients")


@dataclass
class Row:
    """One contestant's rounds: seconds of wall clock, and of CPU on the service node."""

    name: str
    once: Callable[[], int]
    walls: list[float]
    cpus: list[float]
    memory: float = 0.0
    #: Rounds in which it did not hear from all.
    short: int = 0

    def warm_up(self, service: psutil.Process) -> None:
        """A first round for caches, in which memory is looked at and time is not."""
        with TreeMemory() as tree, Peaks([service.pid]) as peaks:
            self.once()
        own = psutil.Process().memory_info().rss / 2**20 if self.name == IN_SESSION else 0.0
        ours = peaks.most[service.pid] if self.name in (OURS, IN_SESSION) else 0.0
        self.memory = tree.most + own + ours

    def measure(self, hosts: int, service: psutil.Process) -> None:
        """Run it once; it must have heard from every host."""
        before, service_before = _children_cpu(), _cpu(service)
        began = time.perf_counter()
        heard = self.once()
        self.walls.append(time.perf_counter() - began)
        self.cpus.append(_children_cpu() - before + _cpu(service) - service_before)
        if heard != hosts:
            if self.name in (OURS, IN_SESSION):
                raise SystemExit(f"{self.name} heard from {heard} of {hosts} hosts")
            # It happens to them on a busy machine. What the round took says nothing then.
            self.short += 1
            self.walls.pop()
            self.cpus.pop()


def _children_cpu() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    own = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime + own.ru_utime + own.ru_stime


def _cpu(process: psutil.Process) -> float:
    # In nanoseconds: psutil's figure counts ticks of 10 ms, and a command costs the service about one.
    return sum(cpu_by_thread([process.pid]).values())


def _lines(argv: list[str], environment: dict[str, str]) -> int:
    done = subprocess.run(argv, env=environment, capture_output=True, text=True, check=False)
    return len({word for word in done.stdout.split() if re.fullmatch(r"h[0-9]+", word)})


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
    for package in ("agent", "controller", "protocol"):
        # As pip does when it installs: else each start of ctl would compile it where bytecode is not to be written.
        compileall.compile_dir(Path(__file__).parents[2] / package, quiet=1)
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
                    if part == "true":
                        _true(session, hosts, rounds)
                    elif part == "race":
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
        self._service = status.pid
        agents = _agents(status.fleet)
        if len(agents) != len(status.hosts):
            raise SystemExit(f"{len(agents)} agents' processes are seen, of {len(status.hosts)}")
        self._peaks = Peaks([self._service, *[agent.pid for agent in agents]])

    def __enter__(self) -> _Peak:
        self._peaks.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._peaks.__exit__()

    def __str__(self) -> str:
        agents = max(size for pid, size in self._peaks.most.items() if pid != self._service)
        return f"largest RSS: service {self._peaks.most[self._service]:.0f} MiB, agent {agents:.0f} MiB"


def _true(session: Session, hosts: int, rounds: int) -> None:
    ctl = str(Path(sys.executable).with_name("ctl"))
    status = session.status()
    agents, service = [agent.pid for agent in _agents(status.fleet)], [status.pid]

    def whole() -> None:
        subprocess.run([ctl, "broadcast", "true"], capture_output=True, check=True)

    def inside() -> None:
        if sum(len(result.hosts) for result in session.run("true").results() if result.ok) != hosts:
            raise SystemExit("true: not all answered")

    def start() -> None:
        # As far as a command that comes to nothing: its words are read, its session is there, and nobody listens.
        environment = os.environ | {"CANOPY_HOME": "/nonexistent"}
        subprocess.run([ctl, "broadcast", "true"], capture_output=True, check=False, env=environment)

    for name, once in (("ctl broadcast true", whole), ("true in an open Session", inside), ("ctl's own start", start)):
        once()
        # The kernel tells of commands' CPU time in ticks of 10 ms for each agent: it takes some rounds to fill them.
        rounds = max(rounds, _CPU_ROUNDS) if once is inside else rounds
        walls, before = [], (_children_cpu(), cpu_by_thread(agents), cpu_by_thread(service))
        for _ in range(rounds):
            began = time.perf_counter()
            once()
            walls.append(time.perf_counter() - began)
        client = _children_cpu() - before[0]
        served = sum(cpu_by_thread(service).values()) - sum(before[2].values())
        spent = {kind: seconds - before[1][kind] for kind, seconds in sorted(cpu_by_thread(agents).items())}
        print(
            f"{name} on {hosts} hosts: {statistics.median(walls):.3f} s (median of {rounds}, {min(walls):.3f} to "
            f"{max(walls):.3f}); CPU ms each: client {client / rounds * 1e3:.0f}, service {served / rounds * 1e3:.0f}, "
            "agents' " + ", ".join(f"{kind} {seconds / rounds * 1e3:.0f}" for kind, seconds in spent.items())
        )


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
    # Text that nothing compresses and that differs by host, 77 characters for each 57 bytes; made before, since to make
    # it takes longer than to bring it here.
    made = session.run(f"head -c {mb * 10**6 // 77 * 57} /dev/urandom | base64 > /tmp/flood").results()
    if sum(len(result.hosts) for result in made if result.ok) != hosts:
        raise SystemExit(f"flood: {made}")
    status = session.status()
    watched = {"service": [status.pid], "agents": [agent.pid for agent in _agents(status.fleet)]}
    digest, count = hashlib.sha256(), 0
    before = {who: cpu_by_thread(pids) for who, pids in watched.items()}
    with _Peak(session) as peak:
        began, cpu = time.perf_counter(), time.process_time()
        for happening in session.run("cat /tmp/flood; rm /tmp/flood", stream=True):
            if isinstance(happening, Piece):
                digest.update(happening.data)
                count += len(happening.data)
        wall, cpu = time.perf_counter() - began, time.process_time() - cpu
    spent = {who: sum(cpu_by_thread(pids).values()) - sum(before[who].values()) for who, pids in watched.items()}
    print(
        f"flood: {count / 1e6:.0f} MB of text from {hosts} hosts in {wall:.2f} s, {count / 1e6 / wall:.0f} MB/s; "
        f"CPU s a GB: client with its hashing {cpu / count * 1e9:.2f}, "
        + ", ".join(f"{who} {seconds / count * 1e9:.2f}" for who, seconds in spent.items())
        + f"; {peak}"
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
    for row in rows:
        row.warm_up(service)
    for _ in range(rounds):
        for row in rows:
            row.measure(hosts, service)
    load, cores = os.getloadavg()[0], os.cpu_count()
    print(f"{COMMAND} on {hosts} test hosts, median of {rounds} rounds, load average {load:.1f}, {cores} cores")
    print(
        f"{'':16}{'wall s':>9}{'min':>8}{'max':>8}{'service node CPU s':>20}{'memory MiB':>12}"
        f"   times ctl's wall, CPU; times Session's wall, CPU"
    )
    for row in rows:
        if row.short:
            print(f"{row.name} did not hear from all hosts in {row.short} of {rounds} rounds, which are left out")
    rows = [row for row in rows if row.walls]
    walls = [statistics.median(row.walls) for row in rows]
    cpus = [statistics.median(row.cpus) for row in rows]
    for row, wall, cpu in zip(rows, walls, cpus, strict=True):
        print(
            f"{row.name:16}{wall:9.3f}{min(row.walls):8.3f}{max(row.walls):8.3f}{cpu:20.3f}{row.memory:12.0f}"
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
