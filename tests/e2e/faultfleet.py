"""A fleet on test hosts that faults are done to, and broadcasts that count how often each host ran them."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from controller import Session, api
from controller.launch import ensure_service
from controller.session import Job, Result
from controller.status import CtlError
from controller.up import UpOptions, UpReport, up
from deploy.testhosts import TestHosts
from protocol.outcomes import Exited, Killed, Lost, Outcome, TimedOut
from tests.net.localfleet import is_running
from tests.waiting import wait_until

#: Where commands leave their marks: none of the agent's own files, so that a full disk of the agent's is not theirs.
MARKS = "root/marks"
AGENTS = "/var/lib/canopy"
#: Of a small disk: five times what an agent's directory takes.
SMALL_DISK = "64m"
#: What a host may take to come back by itself, in seconds: an agent tries its ancestors every 7.5 s at the slowest, one
#: after another, 3 s each.
RETURN_S = 40.0


@dataclass(frozen=True)
class Answer:
    """One outcome of one host, as a client was told it, and when (seconds, monotonic)."""

    outcome: Outcome
    stdout: bytes
    at: float


class Broadcast:
    """A command that leaves a mark on each host where it runs. A thread takes its outcomes in.

    Where the service goes away, the thread asks for the job again, by its number and from its beginning.
    """

    def __init__(
        self, session: Session, tag: str, seconds: float, *, timeout: float, hosts: Iterable[str] | None = None
    ) -> None:
        """It lasts `seconds` and has `timeout` seconds. Raises CtlError where the service does not take it."""
        self.tag, self.timeout = tag, timeout
        self._session = session
        self.began = time.monotonic()
        command = f"echo {tag} >> /{MARKS}; sleep {seconds:g}; hostname"
        self._job: Job = session.run(command, hosts, timeout=timeout, detach=True)
        self.id, self.targets = self._job.id, frozenset(self._job.hosts.values())
        self.answers: dict[str, list[Answer]] = {}
        self._first: dict[str, Answer] = {}
        self.settled_at: float | None = None
        self.over = threading.Event()
        self.error = ""
        #: How often the service went away meanwhile.
        self.asked_again = 0
        self._thread = threading.Thread(target=self._listen, name=tag, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        give_up = self.began + self.timeout + RETURN_S
        while True:
            try:
                self._collect()
                self.settled_at = time.monotonic()
                break
            except (CtlError, OSError) as error:
                if time.monotonic() > give_up:
                    self.error = str(error)
                    break
            time.sleep(0.05)
            with contextlib.suppress(CtlError, OSError):
                self._job = self._session.job(self.id)
                self.asked_again += 1
        self.over.set()

    def _collect(self) -> None:
        answers: dict[str, list[Answer]] = {}
        for happening in self._job:
            if isinstance(happening, Result):
                for host in happening.hosts:
                    answer = Answer(happening.outcome, happening.stdout, time.monotonic())
                    # What was told once stays so: by a service that began anew it must be told again, word by word.
                    first = self._first.setdefault(host, answer)
                    if (first.outcome, first.stdout) == (answer.outcome, answer.stdout):
                        answer = first
                    else:
                        answers.setdefault(host, []).append(first)
                    answers.setdefault(host, []).append(answer)
                self.answers = dict(answers)
        self.answers = answers

    def wait(self, within: float) -> None:
        """Wait until every target has its outcome. Raises AssertionError after `within` seconds."""
        waiting = f"{self.tag} to be settled"
        try:
            wait_until(self.over.is_set, within, waiting)
        except AssertionError as error:
            raise AssertionError(f"{error}; no outcome of {sorted(self.targets - set(self.answers))}") from None
        assert not self.error, self.error

    def outcome(self, host: str) -> Outcome:
        """What became of it at a host: there is one."""
        assert len(self.answers[host]) == 1, (host, self.answers[host])
        return self.answers[host][0].outcome


#: A made-up host without power is one whose processes are all killed, one after another: a command may be first, and
#: its agent have the time to tell it, which is true there.
_POWERLESS = Killed(9)


def faults_of(
    broadcast: Broadcast, marks: dict[str, list[str]], disturbed: Collection[str], powerless: Collection[str] = ()
) -> list[str]:
    """What is wrong with a broadcast that is over, in sentences; nothing where every promise was kept.

    `marks` are the tags that each host's disk holds. `disturbed` are hosts that were themselves struck: they may be
    lost or time out, and those of `powerless`, whose power was cut, may be killed. All others must have run it to its
    end, in time.
    """
    wrong = []
    for host in sorted(broadcast.targets):
        answers = broadcast.answers.get(host, [])
        ran = marks.get(host, []).count(broadcast.tag)
        if len(answers) != 1:
            wrong.append(f"{broadcast.tag}: {len(answers)} outcomes of {host}: {answers}")
            continue
        outcome, stdout, at = answers[0].outcome, answers[0].stdout, answers[0].at
        if ran > 1:
            wrong.append(f"{broadcast.tag}: {host} ran it {ran} times")
        if isinstance(outcome, Exited):
            if outcome != Exited(0) or stdout != f"{host}\n".encode():
                wrong.append(f"{broadcast.tag}: {host} said {outcome} with {stdout!r}")
            if host in marks and ran != 1:
                wrong.append(f"{broadcast.tag}: {host} said that it ran it, and left {ran} marks")
        elif host not in disturbed:
            wrong.append(f"{broadcast.tag}: {host} was not struck, and yet: {outcome}")
        elif not isinstance(outcome, Lost | TimedOut) and not (host in powerless and outcome == _POWERLESS):
            wrong.append(f"{broadcast.tag}: {host} was struck, and yet: {outcome}")
        if host not in disturbed and at - broadcast.began > broadcast.timeout:
            wrong.append(f"{broadcast.tag}: {host} answered after {at - broadcast.began:.1f} s")
    strangers = set(broadcast.answers) - broadcast.targets
    if strangers:
        wrong.append(f"{broadcast.tag}: outcomes of {strangers}, who were not asked")
    return wrong


class FaultFleet:
    """A service here, agents on test hosts, and what can be done to them."""

    def __init__(self, hosts: TestHosts, fanout: int) -> None:
        """Sessions find the service through CANOPY_HOME, which the caller sets."""
        self.hosts, self.fanout = hosts, fanout
        self.names = tuple(hosts.hosts)
        self.session = Session()

    # --- the tree -----------------------------------------------------------------------------------------------------

    def up(self) -> UpReport:
        """`ctl up` for all hosts."""
        return up(UpOptions(hosts=self.names, ssh_config=self.hosts.ssh_config, fanout=self.fanout))

    def restore(self) -> None:
        """Bring all hosts up again and wait until each hangs where it is planned."""
        report = self.up()
        assert not report.failed, report.failed
        wait_until(self.is_home, RETURN_S, "every host to hang where it is planned")

    def status(self) -> dict[str, api.HostStatus]:
        """The service's view, by name."""
        return {host.name: host for host in self.session.status().hosts}

    def in_tree(self) -> set[str]:
        """The hosts that the service has in its tree."""
        return {name for name, host in self.status().items() if host.up}

    def is_home(self) -> bool:
        """Whether every host hangs where it is planned."""
        return all(host.up and host.parent == host.planned_parent for host in self.status().values())

    def children(self) -> dict[str | None, set[str]]:
        """Who hangs below whom now; None is the service."""
        found: dict[str | None, set[str]] = {}
        for name, host in self.status().items():
            if host.up:
                found.setdefault(host.parent, set()).add(name)
        return found

    def depths(self) -> dict[str, int]:
        """How many links lie between each host and the service."""
        status = self.status()
        depths = {}
        for name in status:
            depths[name] = 1
            at: str | None = status[name].parent
            while at is not None:
                depths[name] += 1
                at = status[at].parent
        return depths

    # --- processes ----------------------------------------------------------------------------------------------------

    def agents(self) -> dict[str, int]:
        """The agents that run, by host: their pids on this machine."""
        return self._processes(lambda argv: b"agent" in argv and b"run" in argv)

    def sleeping(self) -> dict[str, int]:
        """A broadcast's command that still lasts, by host."""
        return self._processes(lambda argv: argv[0] == b"sleep")

    def _processes(self, wanted: Callable[[list[bytes]], bool]) -> dict[str, int]:
        namespaces = {}
        for name, host in self.hosts.hosts.items():
            with contextlib.suppress(OSError):
                namespaces[os.readlink(f"/proc/{host.pid}/ns/pid")] = name
        found = {}
        for entry in os.listdir("/proc"):
            with contextlib.suppress(OSError):
                if (
                    entry.isdigit()
                    and (place := namespaces.get(os.readlink(f"/proc/{entry}/ns/pid"))) is not None
                    and wanted(Path("/proc", entry, "cmdline").read_bytes().split(b"\0"))
                ):
                    found[place] = int(entry)
        return found

    def signal(self, number: signal.Signals, *names: str) -> float:
        """Send a signal to these hosts' agents, all at once; when that was (seconds, monotonic)."""
        agents = self.agents()
        at = time.monotonic()
        for pid in [agents[name] for name in names]:
            os.kill(pid, number)
        return at

    def kill_service(self) -> None:
        """Kill -9; returns when it is gone, and its lock with it."""
        pid = self.session.status().pid
        os.kill(pid, signal.SIGKILL)
        wait_until(lambda: not is_running(pid), 10, "the service's end")

    def start_service(self) -> None:
        """As `ctl up` would."""
        ensure_service(None)

    # --- disks --------------------------------------------------------------------------------------------------------

    def give_small_disk(self, name: str) -> None:
        """Put the agents' directory, with what it holds, on a file system of its own. No agent may run there."""
        script = (
            f"mkdir -p {AGENTS} && cp -a {AGENTS} /root/agents && mount -t tmpfs -o size={SMALL_DISK} disk {AGENTS}"
            f" && cp -a /root/agents/. {AGENTS} && rm -r /root/agents"
        )
        self.hosts.run(name, ["sh", "-c", script])

    def fill_disk(self, name: str) -> None:
        """Leave no byte free where the agent's files are."""
        script = f"cat /dev/zero > {AGENTS}/full; df --output=avail {AGENTS} | tail -n 1"
        done = self.hosts.run(name, ["sh", "-c", script])
        assert done.stdout.split() == ["0"], done
        assert "No space left" in done.stderr, done

    def free_disk(self, name: str) -> None:
        """Undo `fill_disk`."""
        self.hosts.run(name, ["rm", f"{AGENTS}/full"])

    def log(self, name: str) -> str:
        """What the host's agent wrote to its log."""
        return "".join(log.read_text() for log in (self.hosts.host(name).root / AGENTS[1:]).glob("*/agent.log"))

    # --- marks --------------------------------------------------------------------------------------------------------

    def marks(self) -> dict[str, list[str]]:
        """The tags of all commands that each host began, as often as it did. Hosts without power are left out."""
        found = {}
        for name, host in self.hosts.hosts.items():
            if not host.pid:
                continue
            root = Path(f"/proc/{host.pid}/root")
            try:
                found[name] = (root / MARKS).read_text().split()
            except FileNotFoundError:
                if (root / "etc").exists():  # else its power has just gone
                    found[name] = []
        return found

    def begun(self, broadcast: Broadcast) -> int:
        """On how many hosts it has begun."""
        return sum(broadcast.tag in marks for marks in self.marks().values())

    def wait_until_begun(self, broadcast: Broadcast) -> None:
        """Wait until a broadcast runs on all its targets."""
        wait_until(lambda: self.begun(broadcast) == len(broadcast.targets), 20, f"{broadcast.tag} to run everywhere")


@contextlib.contextmanager
def fault_fleet(home: Path, hosts: TestHosts, fanout: int) -> Iterator[FaultFleet]:
    """A fleet on these hosts, brought up; its service ends with the block."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CANOPY_HOME", str(home))
        patch.delenv("CANOPY_FLEET", raising=False)
        fleet = FaultFleet(hosts, fanout)
        try:
            report = fleet.up()
            assert not report.failed, report.failed
            yield fleet
        finally:
            with contextlib.suppress(CtlError, ProcessLookupError):
                fleet.kill_service()
