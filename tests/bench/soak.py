"""Broadcasts without end under random faults, each held to what is promised: one outcome for every target, nothing run
twice, and whoever was not struck answers in time.

    python -m tests.bench.soak [--minutes 10] [--hosts 32] [--seed N]

Faults are those of tests/e2e/test_faults.py, several at a time, chosen by the seed. What they meet is chosen by the
machine, so that a seed gives the same faults and not the same run. Exits with 1 where a promise was broken.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import itertools
import os
import random
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from controller.status import CtlError
from controller.up import UpOptions, up
from deploy.testhosts import HostSpec, TestHosts
from protocol.limits import DEADLINE_SLACK
from tests.bench.idle import resident_kib
from tests.e2e.faultfleet import AGENTS, RETURN_S, SMALL_DISK, Broadcast, FaultFleet, fault_fleet, faults_of

FANOUT = 4
#: Broadcasts that are under way at the same time.
_LANES = 4
#: A command lasts up to the first, and has the second to come back, in seconds: orphans of a host that fell silent
#: notice it after 7 s, and may have to try two more ancestors of 3 s each.
_LASTS, _TIMEOUT = 2.0, 30.0
#: How many faults there are at a time. More than one host that has just fallen silent, one above another, takes those
#: below longer than their outcomes are waited for, as the protocol has it.
_FAULTS, _SILENT = 3, 1
#: Hosts with an agents' directory on a small disk of its own. That is in memory, so they keep their power.
_SMALL_DISKS = 4
#: A process is as large as it gets by this age, in seconds, and may grow by so much more, in KiB.
_SETTLED_AGE, _GROWTH = 45.0, 6 * 1024
_TELL_EVERY = 30.0


@dataclass
class Strike:
    """A host that is struck: from when, and until when it was back in the tree (seconds, monotonic)."""

    began: float
    ended: float = float("inf")
    power: bool = False


@dataclass
class Fault:
    """Something that is the matter, until `until`, when `undo` is called."""

    kind: str
    hosts: tuple[str, ...]
    until: float
    undo: Callable[[], None]
    silent: bool = False


@dataclass
class Soak:
    """The run: what was done, what was found."""

    fleet: FaultFleet
    chooser: random.Random
    small_disks: tuple[str, ...]
    violations: list[str] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    outcomes: Counter[str] = field(default_factory=Counter)
    strikes: dict[str, list[Strike]] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)
    #: From then on the service lives, so that its memory can be judged.
    spare_service_from: float = 0.0
    over: threading.Event = field(default_factory=threading.Event)
    #: By pid: what it is, when it was first seen, its size then, when it had settled, and now, in KiB.
    sizes: dict[int, list[float]] = field(default_factory=dict)
    what: dict[int, str] = field(default_factory=dict)
    #: What was done and when, for whoever looks for the cause of a violation.
    story: list[str] = field(default_factory=list)
    _tags: itertools.count[int] = field(default_factory=itertools.count)
    _lock: threading.RLock = field(default_factory=threading.RLock)

    # --- broadcasts ---------------------------------------------------------------------------------------------------

    def lane(self, number: int) -> None:
        """One broadcast after another."""
        chooser = random.Random(number)
        while not self.over.is_set():
            try:
                command = Broadcast(
                    self.fleet.session, f"tag{next(self._tags)}", chooser.uniform(0, _LASTS), timeout=_TIMEOUT
                )
            except (CtlError, OSError):
                self.counts["broadcasts that found no service"] += 1
                time.sleep(0.1)
                continue
            self.judge(command)

    def judge(self, command: Broadcast) -> None:
        """Wait for a broadcast, and hold it to what is promised."""
        try:
            command.wait(_TIMEOUT + DEADLINE_SLACK + RETURN_S)
        except AssertionError as error:
            self.violate(str(error))
            return
        ended = time.monotonic()
        self.note(f"{command.tag} took {ended - command.began:.2f} s")
        with self._lock:
            struck = {
                host
                for host, strikes in self.strikes.items()
                if any(strike.began < ended and strike.ended > command.began for strike in strikes)
            }
            powerless = {
                host for host in struck if any(s.power and s.ended > command.began for s in self.strikes[host])
            }
        for wrong in faults_of(command, self.fleet.marks(), struck, powerless):
            self.violate(wrong)
        self.counts["broadcasts"] += 1
        self.counts["broadcasts with hosts struck"] += bool(struck)
        self.counts["broadcasts whose service was killed"] += bool(command.asked_again)
        for answers in command.answers.values():
            for answer in answers:
                self.outcomes[type(answer.outcome).__name__] += 1

    def violate(self, what: str) -> None:
        """A promise was broken."""
        self.violations.append(what)
        self.note(f"VIOLATION {what}")
        print(f"VIOLATION {what}", flush=True)

    def note(self, what: str) -> None:
        """One line of the story, with the time of day as logs have it."""
        self.story.append(f"{datetime.datetime.now(tz=datetime.UTC):%H:%M:%S.%f} {what}")

    # --- faults -------------------------------------------------------------------------------------------------------

    def struck(self) -> set[str]:
        """The hosts that are struck now."""
        return {host for host, strikes in self.strikes.items() if strikes[-1].ended == float("inf")}

    def strike(self, *hosts: str, power: bool = False) -> None:
        """From now on these may be lost."""
        with self._lock:
            for host in hosts:
                self.strikes.setdefault(host, []).append(Strike(time.monotonic(), power=power))

    def harm(self) -> None:
        """One more fault."""
        fleet, chooser = self.fleet, self.chooser
        whole = sorted(set(fleet.names) - self.struck() - {host for fault in self.faults for host in fault.hosts})
        if len(whole) < len(fleet.names) // 2:
            return
        children = fleet.children()
        relays = [name for name in whole if name in children]
        victim = chooser.choice(relays if relays and chooser.random() < 0.5 else whole)
        kind = chooser.choices(
            ("kill", "kill a quarter", "kill the service", "pause", "cut", "power", "disk"), (8, 1, 1, 5, 5, 3, 3)
        )[0]
        if kind == "kill the service" and time.monotonic() >= self.spare_service_from:
            return
        if kind == "disk":
            victim = chooser.choice(self.small_disks)
        if kind in ("disk", "power") and (victim in self.small_disks) != (kind == "disk"):
            return
        silent = kind in ("pause", "cut")
        if victim not in whole or (silent and sum(fault.silent for fault in self.faults) >= _SILENT):
            return
        self.counts[f"fault: {kind}"] += 1
        self.note(f"{kind} {victim}")
        with self._lock:  # whoever is struck must not be taken for back before the fault is known
            hosts, lasts, undo = self.begin_fault(kind, victim, whole)
            self.note(f"{kind} {' '.join(hosts)}: done")
            self.faults.append(Fault(kind, hosts, time.monotonic() + lasts, undo, silent))

    def begin_fault(
        self, kind: str, victim: str, whole: list[str]
    ) -> tuple[tuple[str, ...], float, Callable[[], None]]:
        """Strike; returns whom, for how long (seconds), and how to undo it. Killed agents come back by `up` alone."""
        fleet, chooser = self.fleet, self.chooser
        match kind:
            case "kill" | "kill a quarter":
                count = 1 if kind == "kill" else len(fleet.names) // 4
                hosts = tuple({victim, *chooser.sample(whole, min(count - 1, len(whole)))})
                self.strike(*hosts)
                for name, pid in fleet.agents().items():
                    if name in hosts:
                        os.kill(pid, signal.SIGKILL)
                return hosts, chooser.uniform(0.5, 4), lambda: None
            case "kill the service":
                fleet.kill_service()
                return (), chooser.uniform(0, 2), lambda: self.retry(fleet.start_service)
            case "pause":
                self.strike(victim)
                pid = fleet.agents()[victim]
                os.kill(pid, signal.SIGSTOP)
                return (victim,), chooser.uniform(0.5, 12), lambda: os.kill(pid, signal.SIGCONT)
            case "cut":
                self.strike(victim)
                fleet.hosts.cut(victim)
                return (victim,), chooser.uniform(0.5, 15), lambda: fleet.hosts.heal(victim)
            case "power":
                self.strike(victim, power=True)
                fleet.hosts.power_off(victim)
                return (victim,), chooser.uniform(0.5, 5), lambda: void(fleet.hosts.power_on(victim))
            case _:
                fleet.fill_disk(victim)
                return (victim,), chooser.uniform(1, 8), lambda: fleet.free_disk(victim)

    def retry(self, start: Callable[[], None]) -> None:
        """Start the service, which `up` may be doing as well."""
        while True:
            try:
                start()
                return
            except CtlError:
                time.sleep(0.2)

    def mend(self, *, everything: bool = False) -> None:
        """Undo what is due."""
        for fault in list(self.faults):
            if everything or time.monotonic() >= fault.until:
                fault.undo()
                self.faults.remove(fault)
                self.note(f"{fault.kind} {' '.join(fault.hosts)}: undone")

    # --- recovery -----------------------------------------------------------------------------------------------------

    def recover(self) -> None:
        """Bring killed agents up again, and note who is back."""
        while not self.over.is_set():
            with contextlib.suppress(CtlError, OSError):
                self.recover_once()
            self.over.wait(0.3)

    def recover_once(self) -> None:
        """The same, once. Raises CtlError while there is no service."""
        with self._lock:
            struck = self.struck()
            busy = {host for fault in self.faults for host in fault.hosts}
        if not struck:
            return
        runs = set(self.fleet.agents())
        dead = tuple(sorted(struck - busy - runs))
        if dead:
            self.counts["up"] += 1
            self.note(f"up {' '.join(dead)}")
            up(UpOptions(hosts=dead, ssh_config=self.fleet.hosts.ssh_config, fanout=FANOUT, connect_timeout=3))
            runs = set(self.fleet.agents())
        now_up = self.fleet.in_tree()
        with self._lock:
            now = time.monotonic()
            back = now_up & runs & struck - busy - {host for fault in self.faults for host in fault.hosts}
            for host in back:
                self.strikes[host][-1].ended = now
        if back:
            self.note(f"back: {' '.join(sorted(back))}")

    # --- memory -------------------------------------------------------------------------------------------------------

    def measure(self) -> None:
        """Note how large the processes are."""
        now = time.monotonic()
        pids = dict.fromkeys(self.fleet.agents().values(), "agent")
        with contextlib.suppress(CtlError, OSError):
            pids[self.fleet.session.status().pid] = "service"
        for pid, what in pids.items():
            with contextlib.suppress(OSError, ValueError):
                size = resident_kib(pid)
                self.what[pid] = what
                entry = self.sizes.setdefault(pid, [now, size, 0, 0, 0])
                if not entry[2] and now - entry[0] >= _SETTLED_AGE:
                    entry[2] = size
                entry[3], entry[4] = size, now

    def grew(self) -> None:
        """Judge their growth, and print it."""
        for what in ("service", "agent"):
            grown = [e for pid, e in self.sizes.items() if self.what[pid] == what and e[2]]
            if not grown:
                print(f"memory of {what}: none lived long enough to tell")
                continue
            longest = max(grown, key=lambda e: e[4] - e[0])
            worst = max(grown, key=lambda e: e[3] - e[2])
            print(
                f"memory of {what} ({len(grown)} processes): the longest lived {longest[4] - longest[0]:.0f} s, with "
                f"{longest[1] / 1024:.1f} MiB at first, {longest[2] / 1024:.1f} after {_SETTLED_AGE:g} s, "
                f"{longest[3] / 1024:.1f} at last; largest growth after that: {(worst[3] - worst[2]) / 1024:.1f} MiB"
            )
            if worst[3] - worst[2] > _GROWTH:
                self.violate(f"the {what} grew from {worst[2]:.0f} to {worst[3]:.0f} KiB")

    # --- the whole ----------------------------------------------------------------------------------------------------

    def run(self, seconds: float) -> None:
        """Everything at once for so long, and then all of it mended."""
        threads = [threading.Thread(target=self.lane, args=(number,), daemon=True) for number in range(_LANES)]
        threads.append(threading.Thread(target=self.recover, daemon=True))
        for thread in threads:
            thread.start()
        ends, told = time.monotonic() + seconds, time.monotonic()
        self.spare_service_from = ends - seconds / 2
        while time.monotonic() < ends:
            with contextlib.suppress(CtlError):  # the service is one of the victims
                self.mend()
                if len(self.faults) < _FAULTS:
                    self.harm()
            time.sleep(self.chooser.uniform(0.1, 1.5))
            if time.monotonic() >= told + _TELL_EVERY:
                told = time.monotonic()
                self.measure()
                print(f"{ends - told:.0f} s left: {dict(self.counts)} {dict(self.outcomes)}", flush=True)
        self.mend(everything=True)
        self.over.set()
        for thread in threads:
            thread.join(_TIMEOUT + DEADLINE_SLACK + 2 * RETURN_S)
            if thread.is_alive():
                self.violate(f"{thread.name} did not end")
        self.converge()

    def converge(self) -> None:
        """Without faults the tree is whole again, every host answers, and nothing ever ran twice."""
        try:
            self.fleet.restore()
        except (AssertionError, CtlError) as error:
            self.violate(f"the fleet did not come back: {error}")
        self.strikes.clear()
        self.judge(Broadcast(self.fleet.session, "last", 0, timeout=_TIMEOUT))
        for name, tags in self.fleet.marks().items():
            for tag, times in Counter(tags).items():
                if times > 1:
                    self.violate(f"{tag}: {name} ran it {times} times")
        logs = {name: self.fleet.log(name) for name in self.fleet.names}
        logs["service"] = (self.fleet.session.directory / "service.log").read_text()
        for name, log in logs.items():
            if "Traceback" in log:
                self.violate(f"{name} met an error of its own: {log.strip().splitlines()[-1]}")
        self.measure()


def void(_: object) -> None:
    """For a lambda whose value nobody wants."""


def main() -> int:
    """The soak."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--hosts", type=int, default=32)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1_000_000))
    arguments = parser.parse_args()
    names = [f"h{number}" for number in range(arguments.hosts)]
    chooser = random.Random(arguments.seed)
    print(f"seed {arguments.seed}", flush=True)
    with tempfile.TemporaryDirectory() as scratch, TestHosts([HostSpec(name) for name in names]) as hosts:
        small = tuple(sorted(chooser.sample(names, min(_SMALL_DISKS, len(names)))))
        for name in small:
            mount = f"mkdir -p {AGENTS} && mount -t tmpfs -o size={SMALL_DISK},mode=755 disk {AGENTS}"
            hosts.run(name, ["sh", "-c", mount])
        with fault_fleet(Path(scratch), hosts, FANOUT) as fleet:
            soak = Soak(fleet, chooser, small)
            soak.measure()
            soak.run(arguments.minutes * 60)
            print(f"counts: {dict(sorted(soak.counts.items()))}")
            print(f"outcomes: {dict(soak.outcomes)}")
            soak.grew()
            if soak.violations:
                keep_logs(soak, Path(tempfile.mkdtemp(prefix="soak-")))
    print(f"violations: {len(soak.violations)} (seed {arguments.seed})")
    return 1 if soak.violations else 0


def keep_logs(soak: Soak, into: Path) -> None:
    """Keep what was done, and what the service and the agents wrote, for whoever looks for the cause."""
    fleet = soak.fleet
    (into / "story").write_text("\n".join(soak.story) + "\n")
    (into / "service.log").write_bytes((fleet.session.directory / "service.log").read_bytes())
    for name in fleet.names:
        (into / f"{name}.log").write_text(fleet.log(name))
    print(f"logs are in {into}")


if __name__ == "__main__":
    sys.exit(main())
