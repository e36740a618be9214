"""`ctl push` beside TakTuk `put`, `clush --copy` and parallel scp, on test hosts of this machine, in one run.

    python -m tests.bench.push [--only shaped,draw,unshaped,hop,memory,slow,kill,files] [--hosts 32] [--mb 64]

Each part stands alone. Shaped parts have links of 80 Mbit/s both ways at every host; the service node's own is not
shaped. Data is random, so that nothing compresses. All hosts share this machine's cores: the load average is printed.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import psutil

from controller.session import Result, Session
from controller.up import UpOptions, down, up
from deploy.testhosts import HostSpec, TestHosts

#: The shaped links' rate in Mbit/s, and in bytes a second.
RATE_MBIT = 80.0
RATE = RATE_MBIT * 1e6 / 8
#: The one slow host's, in Mbit/s.
SLOW_MBIT = 8.0
_MB, _MIB = 10**6, 1 << 20


class Fleet:
    """Test hosts with agents on them."""

    def __init__(self, hosts: TestHosts, names: list[str]) -> None:
        self.hosts, self.names = hosts, names
        self.session = Session()
        self.config = Path(hosts.ssh_config)
        self._pushed = 0

    def agents(self) -> list[psutil.Process]:
        """The agents' processes, as this machine sees them."""
        identity, found = (self.session.directory / "fleet.id").read_text().strip(), []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if line[1:4] == ["-m", "agent", "run"] and identity in " ".join(line):
                found.append(process)
        return found

    def push(self, source: Path, at: float | None = None, then: Callable[[], None] | None = None) -> dict[str, float]:
        """Push to all; when each host was done, in seconds. `then` is called `at` seconds after the beginning.

        A host whose outcome is no success is left out.
        """
        self._pushed += 1
        timer = threading.Timer(at or 0.0, then) if then is not None else None
        began = time.perf_counter()
        if timer is not None:
            timer.start()
        done: dict[str, float] = {}
        for happening in self.session.push(source, f"/tmp/pushed-{self._pushed}"):
            if isinstance(happening, Result) and happening.ok:
                done |= dict.fromkeys(happening.hosts, time.perf_counter() - began)
        if timer is not None:
            timer.join()
        return done

    def clean(self) -> None:
        """Remove what was pushed: the hosts' disks are this machine's memory."""
        self.session.run("rm -rf /tmp/pushed-* /tmp/other-*").results()


@contextmanager
def fleet_of(count: int, *, rate: float | None = None, slow: int | None = None) -> Iterator[Fleet]:
    """Hosts with links of `rate` Mbit/s; that of host `slow` has SLOW_MBIT."""
    names = [f"h{number}" for number in range(count)]
    specs = [HostSpec(name, rate_mbit=SLOW_MBIT if number == slow else rate) for number, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as home, TestHosts(specs) as hosts:
        os.environ["CANOPY_HOME"] = home
        report = up(UpOptions(hosts=tuple(names), ssh_config=Path(hosts.ssh_config)))
        if report.failed:
            raise SystemExit(f"not up: {report.failed}")
        try:
            yield Fleet(hosts, names)
        finally:
            down(None, purge=True)


@contextmanager
def random_file(size: int) -> Iterator[Path]:
    """A file of so many bytes that don't compress."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "data")
        chooser = random.Random(size)
        with path.open("wb") as file:
            for at in range(0, size, _MIB):
                file.write(chooser.randbytes(min(_MIB, size - at)))
        yield path


def say(text: str) -> None:
    """One line of the report, with the load beside it."""
    print(f"{text}   (load {os.getloadavg()[0]:.1f})", flush=True)


def _ctl(*arguments: str) -> float:
    began = time.perf_counter()
    ctl = str(Path(sys.executable).with_name("ctl"))
    done = subprocess.run([ctl, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ctl {' '.join(arguments)}: {done.stderr[-2_000:]}")
    return time.perf_counter() - began


# --- the others -------------------------------------------------------------------------------------------------------


def _others(fleet: Fleet, source: Path) -> dict[str, Callable[[], None]]:
    """The tools that people use now, as far as they are installed."""
    options = f"-F {fleet.config}"
    everybody = f"h[0-{len(fleet.names) - 1}]"

    def clush() -> None:
        arguments = [
            "-q",
            "-f",
            "64",
            "-w",
            everybody,
            "-o",
            options,
            "--copy",
            str(source),
            "--dest",
            "/tmp/other-clush",
        ]
        _run(["clush", *arguments])

    def taktuk() -> None:
        machines = [word for name in fleet.names for word in ("-m", name)]
        orders = ["broadcast", "put", "[", str(source), "]", "[", "/tmp/other-taktuk", "]"]
        _run(["taktuk", "-c", f"ssh {options}", *machines, *orders])

    def scp() -> None:
        running = [
            subprocess.Popen(["scp", "-q", "-F", str(fleet.config), str(source), f"{name}:/tmp/other-scp"])
            for name in fleet.names
        ]
        for process in running:
            if process.wait():
                raise SystemExit("scp failed")

    tools = (("clush", "clush --copy", clush), ("taktuk", "TakTuk put", taktuk), ("scp", "parallel scp", scp))
    return {name: run for program, name, run in tools if shutil.which(program)}


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{argv[0]}: {(done.stderr or done.stdout)[-1_000:]}")


def compete(fleet: Fleet, source: Path, *, limit_s: float | None, others: bool) -> float:
    """One contest; ours against `limit_s` where that is said. Returns our time in seconds."""
    fleet.clean()
    ours = _ctl("push", "-q", str(source), "/tmp/pushed-ctl")
    size, hosts = source.stat().st_size, len(fleet.names)
    beside = "" if limit_s is None else f"   {ours / limit_s:.3f} x size / rate"
    say(f"{size / _MB:.0f} MB to {hosts:3} hosts: ctl push          {ours:8.2f} s{beside}")
    fleet.clean()
    for name, tool in _others(fleet, source).items() if others else ():
        began = time.perf_counter()
        tool()
        wall = time.perf_counter() - began
        say(f"{size / _MB:.0f} MB to {hosts:3} hosts: {name:18}{wall:8.2f} s   {wall / ours:.1f} times ours")
        fleet.clean()
    return ours


# --- the parts --------------------------------------------------------------------------------------------------------


def shaped(hosts: int, size: int) -> None:
    """64 MB over links of 80 Mbit/s, to 8 hosts and to 32."""
    for count in sorted({min(8, hosts), hosts}):
        with fleet_of(count, rate=RATE_MBIT) as fleet, random_file(size) as source:
            compete(fleet, source, limit_s=size / RATE, others=True)


def draw(hosts: int, size: int) -> None:
    """The time as a function of the number of hosts."""
    times: dict[int, float] = {}
    with random_file(size) as source:
        count = 2
        while count <= hosts:
            with fleet_of(count, rate=RATE_MBIT) as fleet:
                times[count] = compete(fleet, source, limit_s=size / RATE, others=False)
            count *= 2
    most = max(times.values())
    for count, wall in times.items():
        print(f"{count:4} hosts {wall:7.2f} s {'#' * round(60 * wall / most)}")
    print(f"size / rate{size / RATE:8.2f} s {'#' * round(60 * size / RATE / most)}")


def unshaped(hosts: int, size: int) -> None:
    """64 MiB to all hosts without limit."""
    with fleet_of(hosts) as fleet, random_file(size // _MB * _MIB) as source:
        compete(fleet, source, limit_s=None, others=True)


def hop(hosts: int, size: int) -> None:
    """Eight times as much to 8 hosts, against one CURVE hop between two processes of this machine."""
    size *= 8
    one = _curve_hop(size)
    say(f"one CURVE hop: {size / one / _MB:.0f} MB/s")
    with fleet_of(min(8, hosts)) as fleet, random_file(size) as source:
        service = psutil.Process(fleet.session.status().pid)
        processes = [service, *fleet.agents()]
        before = sum(sum(process.cpu_times()[:2]) for process in processes)
        done = fleet.push(source)
        spent = sum(sum(process.cpu_times()[:2]) for process in processes) - before
        wall, bytes_in = max(done.values()), size * len(done)
        rate = bytes_in / wall
        say(
            f"{size / _MB:.0f} MB to {len(done)} hosts: {wall:.2f} s, {rate / _MB:.0f} MB/s in all, "
            f"{rate / (size / one):.2f} of one hop; {spent / bytes_in * 1e9:.2f} CPU-s for each GB and host"
        )


def _curve_hop(size: int) -> float:
    """Seconds for so many bytes from one process to another over a CURVE socket, in frames of a chunk."""
    import zmq

    from protocol.limits import CHUNK

    (server, server_secret), (client, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pull = context.socket(zmq.PULL)
    pull.curve_server, pull.curve_publickey, pull.curve_secretkey = True, server, server_secret
    port = pull.bind_to_random_port("tcp://127.0.0.1")
    program = (
        "import os, sys, zmq\n"
        "s = zmq.Context().socket(zmq.PUSH)\n"
        "s.curve_serverkey, s.curve_publickey, s.curve_secretkey = (x.encode() for x in sys.argv[1:4])\n"
        "s.sndhwm = 64\n"
        "s.connect('tcp://127.0.0.1:' + sys.argv[4])\n"
        "data = os.urandom(int(sys.argv[5]))\n"
        "for _ in range(int(sys.argv[6])): s.send(data)\n"
        "s.close(60_000)\n"
    )
    keys = [key.decode() for key in (server, client, client_secret)]
    count = size // CHUNK
    sender = subprocess.Popen([sys.executable, "-c", program, *keys, str(port), str(CHUNK), str(count)])
    pull.recv()
    began = time.perf_counter()
    for _ in range(count - 1):
        pull.recv()
    wall = time.perf_counter() - began
    sender.wait()
    context.destroy(0)
    return wall


def memory(hosts: int, size: int) -> None:
    """How much the agents' resident memory grows while four times as much passes through."""
    with fleet_of(min(8, hosts)) as fleet, random_file(4 * size) as source:
        agents = fleet.agents()
        before = {agent.pid: agent.memory_info().rss for agent in agents}
        most = dict(before)
        over = threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for agent in agents:
                    most[agent.pid] = max(most[agent.pid], agent.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        fleet.push(source)
        over.set()
        watcher.join()
        grown = sorted((most[pid] - before[pid]) / _MIB for pid in before)
        grew = f"RSS of an agent grows by {grown[0]:.1f} to {grown[-1]:.1f} MiB"
        say(f"{4 * size / _MB:.0f} MB to {len(agents)} hosts: {grew}")


def slow(hosts: int, size: int) -> None:
    """One host at 8 Mbit/s among those at 80."""
    with random_file(size) as source:
        with fleet_of(hosts, rate=RATE_MBIT) as fleet:
            without = max(fleet.push(source).values())
        with fleet_of(hosts, rate=RATE_MBIT, slow=hosts // 2) as fleet:
            done = fleet.push(source)
    lazy = done.pop(f"h{hosts // 2}")
    wall = max(done.values())
    say(
        f"one of {hosts} at {SLOW_MBIT:.0f} Mbit/s: the others {wall:.2f} s, "
        f"{wall / without:.2f} of {without:.2f} s without it; itself {lazy:.1f} s"
    )


def kill(hosts: int, size: int) -> None:
    """A host in the middle is killed at half time."""
    with random_file(size) as source, fleet_of(hosts, rate=RATE_MBIT) as fleet:
        without = max(fleet.push(source).values())
        fleet.clean()
        done = fleet.push(source, without / 2, lambda: fleet.hosts.power_off(f"h{hosts // 2}"))
    wall = max(done.values())
    say(
        f"one of {hosts} killed at half time: {len(done)} others {wall:.2f} s, "
        f"{wall - without:+.2f} s beside {without:.2f} s without"
    )


def files(hosts: int, size: int) -> None:
    """10,000 files of 1 KB as a directory against one file of 10 MB, to 16 hosts."""
    with tempfile.TemporaryDirectory() as folder, fleet_of(min(16, hosts)) as fleet:
        tree = Path(folder, "tree")
        for number in range(10_000):
            path = tree / f"{number // 100}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.Random(number).randbytes(1_000))
        with random_file(10 * _MB) as source:
            one = max(fleet.push(source).values())
        many = max(fleet.push(tree).values())
        say(
            f"10,000 files of 1 KB to {len(fleet.names)} hosts: {many:.2f} s, "
            f"{many / one:.1f} times one file of 10 MB ({one:.2f} s)"
        )


PARTS: dict[str, Callable[[int, int], None]] = {
    part.__name__: part for part in (shaped, draw, unshaped, hop, memory, slow, kill, files)
}


def main() -> int:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--hosts", type=int, help="at most so many hosts (default: each part's own)")
    parser.add_argument("--mb", type=int, default=64, help="how much is pushed, in MB")
    arguments = parser.parse_args()
    own = {"draw": 64, "unshaped": 64, "hop": 8, "memory": 8, "files": 16}
    for name in arguments.only.split(","):
        print(f"-- {name}: {PARTS[name].__doc__}", flush=True)
        PARTS[name](arguments.hosts or own.get(name, 32), arguments.mb * _MB)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
