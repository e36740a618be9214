"""Test hosts with agents for `tests.bench.push`, and how long pushes to them take."""

from __future__ import annotations

import os
import random
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Container, Iterator
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
MB, MIB = 10**6, 1 << 20


class Fleet:
    """Test hosts with agents on them."""

    def __init__(self, hosts: TestHosts, names: list[str]) -> None:
        self.hosts, self.names = hosts, names
        self.session = Session()
        self.config = Path(hosts.ssh_config)
        self._pushed = 0
        self._lock = threading.Lock()

    def cpu(self) -> float:
        """CPU seconds that the service and all agents have taken."""
        service = psutil.Process(self.session.status().pid)
        return sum(sum(process.cpu_times()[:2]) for process in (service, *self.agents()))

    def agents(self) -> list[psutil.Process]:
        """The agents' processes, as this machine sees them."""
        identity, found = (self.session.directory / "fleet.id").read_text().strip(), []
        for process in psutil.process_iter(["cmdline"]):
            line = process.info["cmdline"] or []
            if line[1:4] == ["-m", "agent", "run"] and identity in " ".join(line):
                found.append(process)
        return found

    def push(
        self,
        source: Path,
        at: float | None = None,
        then: Callable[[], None] | None = None,
        *,
        until: Container[str] = (),
        folder: str = "/tmp",
    ) -> dict[str, float]:
        """Push to all; when each host was done, in seconds. `then` is called `at` seconds after the beginning.

        A host whose outcome is no success is left out. Once all but those of `until` are done it is not waited for
        them.
        """
        with self._lock:
            self._pushed += 1
            target = f"{folder}/pushed-{self._pushed}"
        timer = threading.Timer(at or 0.0, then) if then is not None else None
        began = time.perf_counter()
        if timer is not None:
            timer.start()
        done: dict[str, float] = {}
        waited = {name for name in self.names if name not in until}
        with self.session.push(source, target) as job:
            for happening in job:
                if isinstance(happening, Result):
                    waited.difference_update(happening.hosts)
                    if happening.ok:
                        done |= dict.fromkeys(happening.hosts, time.perf_counter() - began)
                    if not waited:
                        break
        if timer is not None:
            timer.join()
        return done

    def by_rank(self) -> list[str]:
        """The hosts in the order in which pushes pass through them."""
        return [host.name for host in sorted(self.session.status().hosts, key=lambda host: host.rank)]

    def answer(self) -> float:
        """Seconds that all hosts take to run a program that does nothing."""
        began = time.perf_counter()
        results = self.session.run(["/bin/true"]).results()
        wall = time.perf_counter() - began
        if not all(result.ok for result in results):
            raise SystemExit(f"not all hosts answered: {results}")
        return wall

    def growth(self, work: Callable[[], object]) -> list[float]:
        """How much the resident memory of each agent grew at most while `work` was done, in MiB, the least first."""
        agents = self.agents()
        before = {agent.pid: agent.memory_info().rss for agent in agents}
        most, over = dict(before), threading.Event()

        def watch() -> None:
            while not over.wait(0.05):
                for agent in agents:
                    most[agent.pid] = max(most[agent.pid], agent.memory_info().rss)

        watcher = threading.Thread(target=watch)
        watcher.start()
        try:
            work()
        finally:
            over.set()
            watcher.join()
        return sorted((most[pid] - before[pid]) / MIB for pid in before)

    def touch(self, size: int) -> None:
        """Write and remove so many bytes on each host. Their disks are this machine's memory, of which a GB costs one
        to two CPU seconds more when it is used for the first time: that would be the first tool's to pay."""
        self.session.run(f"head -c {size} /dev/zero > /tmp/pushed-0; rm /tmp/pushed-0").results()

    def clean(self) -> None:
        """Remove what was pushed: the hosts' disks are this machine's memory."""
        self.session.run("rm -rf /tmp/pushed-* /srv/pushed-* /tmp/other-* /srv/other-*").results()


@contextmanager
def fleet_of(
    count: int, *, rate: float | None = None, slow: int | None = None, node_rate: float | None = None
) -> Iterator[Fleet]:
    """Hosts with links of `rate` Mbit/s; that of host `slow`, whose rank that is, has SLOW_MBIT. The service node sends
    at `node_rate` Mbit/s."""
    names = [f"h{number}" for number in range(count)]
    specs = [HostSpec(name, rate_mbit=SLOW_MBIT if number == slow else rate) for number, name in enumerate(names)]
    with tempfile.TemporaryDirectory() as home, TestHosts(specs) as hosts:
        if node_rate is not None:
            shape = f"tc qdisc replace dev {hosts.link} root tbf rate {node_rate:g}mbit burst 128kb latency 100ms"
            subprocess.run(shape.split(), check=True)
        os.environ["CANOPY_HOME"] = home
        # Ranks are given in the order in which hosts come.
        stages = [names] if slow is None else [names[:slow], [names[slow]], names[slow + 1 :]]
        for stage in filter(None, stages):
            report = up(UpOptions(hosts=tuple(stage), ssh_config=Path(hosts.ssh_config)))
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
            for at in range(0, size, MIB):
                file.write(chooser.randbytes(min(MIB, size - at)))
        yield path


def say(text: str) -> None:
    """One line of the report, with the load beside it."""
    print(f"{text}   (load {os.getloadavg()[0]:.1f})", flush=True)


def ctl(*arguments: str) -> float:
    """Seconds that a `ctl` command takes. It must end well."""
    began = time.perf_counter()
    program = str(Path(sys.executable).with_name("ctl"))
    done = subprocess.run([program, *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"ctl {' '.join(arguments)}: {done.stderr[-2_000:]}")
    return time.perf_counter() - began
