"""`python -m agent`: `enrol` makes this host's keys and prints their public half, `run` is the agent itself."""

from __future__ import annotations

from agent import lean  # noqa: F401  before anything that imports asyncio

# isort: split
import argparse
import asyncio
import gc
import logging
import os
import random
import signal
import sys
import time
from contextlib import suppress
from pathlib import Path

from agent.identity import HostDirectory, NotEnrolled, enrolment_text
from agent.keyring import Keyring
from agent.notify import Notifier
from agent.outcomes import KeptOutcomes
from agent.shell import Shell
from agent.staging import trim
from agent.version import VERSION
from agent.worker import AgentWorker
from protocol.commands import Leave
from protocol.events import Replan
from protocol.relay import Relay
from protocol.trust import Guard, Untrusted

_NONCE = 16

#: How often a running agent looks whether it was enrolled anew, in seconds: `ctl up` waits longer for it than that.
_WELCOME_EVERY = 3.0


def _age() -> float:
    """How long this process has been there at least, in seconds: imports take some tenths (proc(5), stat, field 22).

    The kernel says it in whole ticks, so a tick less: a command that a predecessor was given is not to seem younger.
    """
    started = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - (started + 1) / os.sysconf("SC_CLK_TCK")


class _Welcomes:
    """Tells the relay when `ctl up` brought a newer plan to an agent that runs: the old one may lead nowhere any
    more."""

    def __init__(self, directory: HostDirectory, shell: Shell) -> None:
        self._directory = directory
        self._shell = shell
        self._loop = asyncio.get_running_loop()
        self._seen = self._stamp()
        self._timer = self._loop.call_later(_WELCOME_EVERY, self._look)

    def _stamp(self) -> int:
        return (self._directory.path / "welcome").stat().st_mtime_ns

    def _look(self) -> None:
        self._timer = self._loop.call_later(_WELCOME_EVERY, self._look)
        try:
            stamp = self._stamp()
            if stamp != self._seen:
                self._seen = stamp
                self._shell.feed(Replan(self._directory.plan(self._directory.welcome())))
        except (OSError, NotEnrolled, Untrusted) as error:
            logging.getLogger("canopy").warning("the new welcome is of no use: %s", error)

    def close(self) -> None:
        self._timer.cancel()


async def serve(directory: HostDirectory, uri: str | None, *, waited: bool = False) -> None:
    """Be the agent until a Leave or a signal. `waited` says that a predecessor may have lived until just now."""
    identity, welcome = directory.identity(), directory.welcome()
    plan = directory.plan(welcome)
    loop = asyncio.get_running_loop()
    rank = plan.you.rank
    if rank is None:
        raise NotEnrolled("the plan is the root's own; run `ctl up` for this host again")
    started = loop.time() - (0.0 if waited else _age())
    guard = Guard(fleet=welcome.fleet, verify_key=welcome.verify_key, rank=rank, started=started)
    kept = KeptOutcomes(directory.outcomes)
    relay = Relay(
        plan=plan,
        incarnation=directory.next_incarnation(),
        draw=random.SystemRandom().random,
        nonce=lambda: os.urandom(_NONCE),
        guard=guard,
        found=kept.scan(),
    )
    trim(directory.parts)
    keyring = Keyring(identity.public, identity.secret)
    shell = Shell(keyring, relay, identity.address, identity.control_port, identity.bulk_port)
    worker = AgentWorker(shell, directory, kept, version=VERSION, uri=uri)
    shell.worker = worker
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, worker.end)
    shell.begin()
    worker.begin_watching()
    # What an agent is made of stays until its end: the collector need not walk through it again and again, which costs
    # most where many processes share a processor's cache. Cycles are few: it looks for them a tenth as often.
    gc.collect()
    gc.freeze()
    gc.set_threshold(7_000)
    notifier = Notifier()
    notifier.begin(loop)
    welcomes = _Welcomes(directory, shell)
    leave: Leave | None = await worker.ended
    welcomes.close()
    from agent import leaving

    notifier.end(leaving.extension(leave))
    shell.close()
    left = await worker.close(leave)
    if left:
        notifier.tell(f"ended, but for {'; '.join(left)}")
    if leave is not None:
        leaving.leave(welcome.fleet, directory.path, purge=leave.purge)


async def _serve_and_exit(directory: HostDirectory, uri: str | None, *, waited: bool) -> None:
    await serve(directory, uri, waited=waited)
    # Now, and without waiting for tasks and threads: those that wait for libvirt may wait for ever.
    logging.shutdown()
    os._exit(0)


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="agent", description=__doc__)
    actions = parser.add_subparsers(dest="action", required=True)
    enrol = actions.add_parser("enrol", help="make keys and ports where there are none, print the public half as JSON")
    enrol.add_argument("--address", required=True, help="the IP address at which this host listens")
    run = actions.add_parser("run", help="be the agent, in the foreground")
    run.add_argument("--libvirt", metavar="URI", default=os.environ.get("CANOPY_LIBVIRT"), help="libvirt's URI")
    for action in (enrol, run):
        action.add_argument("--dir", type=Path, required=True, help="this agent's directory")
    arguments = parser.parse_args()
    directory = HostDirectory(arguments.dir.absolute())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        if arguments.action == "enrol":
            print(enrolment_text(directory.enrol(arguments.address, new_ports=True)))
            return 0
        try:
            waited = directory.is_locked()
            directory.lock()  # until this process ends
        except BlockingIOError:
            print(f"an agent runs in {directory.path} already", file=sys.stderr)
            return 1
        with suppress(OSError):
            os.chdir(Path.home())
        asyncio.run(_serve_and_exit(directory, arguments.libvirt, waited=waited))
    except (NotEnrolled, Untrusted, OSError) as error:
        print(f"agent: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
