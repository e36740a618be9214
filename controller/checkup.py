"""The examining for `ctl doctor`: the service, the host over the user's SSH, and its port.

What was seen is `doctor`'s to judge.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from agent import probe
from agent.keyring import from_text
from agent.seed_frames import Terms
from agent.seed_session import NO_PYTHON, Command, printable, remote_command, why
from controller import api, ssh
from controller.bundle import BundleError, Bundles, Platform
from controller.doctor import Examined, Probed
from controller.local import host_directory
from controller.session import Session
from controller.status import CtlError, ExitStatus

#: Hosts that are examined at a time: a login costs this machine some 20 ms of CPU.
_AT_A_TIME = 16
#: For the probe once the host has answered, in seconds: it waits up to 10 for libvirt, and 3 for each planned ancestor.
_PROBE_WITHIN = 40.0
#: A TCP connection from here, in seconds.
_CONNECT_WITHIN = 3.0
#: What a host may say: login scripts talk as well.
_MOST = 1 << 20
_PROBE = Path(probe.__file__).read_bytes()
_MARKER = probe.MARKER.encode()


@dataclass(frozen=True, kw_only=True)
class CheckupOptions:
    """How hosts are reached: ssh's -F and -l, and how long one may take to answer, in seconds."""

    ssh_config: Path | None = None
    login: str = ""
    connect_timeout: float = 10.0


@dataclass(frozen=True)
class _Said:
    """What came of running the probe."""

    ssh: str = ""
    python: str = ""
    probed: Probed | None = None
    seconds: float = 0.0
    offset: float = 0.0


def examine(session: Session, names: Sequence[str], options: CheckupOptions) -> list[Examined]:
    """Examine these hosts, members or not. Raises CtlError."""
    known: dict[str, api.HostKnown] = {}
    stranger, fleet = "", ""
    down: tuple[str, ...] = ()
    try:
        status = session.status()
        fleet = status.fleet
        down = tuple(host.name for host in status.hosts if not host.up)
        members = {host.name for host in status.hosts}
        known = {name: session.host(name) for name in names if name in members}
    except CtlError as error:
        if error.status != ExitStatus.NO_SERVICE:
            raise
        stranger = "no service runs for this fleet"
        with contextlib.suppress(OSError):
            fleet = (session.directory / "fleet.id").read_text().strip()
    bundles = Bundles()

    async def one(name: str, turn: asyncio.Semaphore) -> Examined:
        member = known.get(name)
        local = member is not None and "local" in member.status.facts
        asked = {
            "fleet": fleet or session.directory.name,
            "directory": str(host_directory(session, name)) if local else "",
            "ancestors": member.ancestors if member else (),
        }
        async with turn:
            said, port = await asyncio.gather(
                _ask(None if local else name, msgspec.json.encode(asked), options), _reach(member)
            )
        bundle, no_bundle = _bundle(bundles, member, said.probed)
        return Examined(
            name=name,
            known=member,
            stranger=stranger,
            ssh=said.ssh,
            seconds=said.seconds,
            python=said.python,
            probed=said.probed,
            port=port,
            offset=said.offset,
            key=from_text(member.key).hex() if member else "",
            bundle=bundle,
            no_bundle=no_bundle,
            down=down,
        )

    async def all_of_them() -> list[Examined]:
        turn = asyncio.Semaphore(_AT_A_TIME)
        return list(await asyncio.gather(*(one(name, turn) for name in names)))

    return asyncio.run(all_of_them())


def _bundle(bundles: Bundles, member: api.HostKnown | None, probed: Probed | None) -> tuple[str, str]:
    """The identity of today's bundle for such a host, or why there is none."""
    if probed is None or (member is not None and "local" in member.status.facts):
        return "", ""
    try:
        platform = Platform(
            python=probed.python, machine=probed.machine, libc=probed.libc, libc_version=probed.libc_version
        )
        return bundles.identity(platform), ""
    except BundleError as error:
        return "", str(error)


async def _reach(member: api.HostKnown | None) -> str:
    """Why the agent's port can't be reached from here, or nothing."""
    if member is None:
        return ""
    try:
        connecting = asyncio.open_connection(member.status.address, member.control_port)
        _, writer = await asyncio.wait_for(connecting, _CONNECT_WITHIN)
    except TimeoutError:
        return f"no answer within {_CONNECT_WITHIN:.0f} s"
    except OSError as error:
        return os.strerror(error.errno).lower() if error.errno else str(error)
    writer.close()
    with contextlib.suppress(OSError):
        await writer.wait_closed()
    return ""


async def _ask(name: str | None, asked: bytes, options: CheckupOptions) -> _Said:
    """Run the probe on a host; without a name on this machine."""
    remote = remote_command(_PROBE)
    if name is None:
        command = Command(argv=("sh", "-c", remote), env=os.environ)
    elif not ssh.NAME.fullmatch(name):
        return _Said(ssh="not a host name")
    else:
        terms = Terms(fleet="", connect_timeout=options.connect_timeout)
        command = ssh.Ssh(options.ssh_config, options.login).command(name, remote, terms, "")
    before = time.time()
    try:
        status, out, err = await _run(command, _PROBE + asked + b"\n", options.connect_timeout + _PROBE_WITHIN)
    except OSError as error:
        return _Said(ssh=f"ssh can't be run here: {error.strerror}; install the OpenSSH client")
    except TimeoutError:
        return _Said(ssh=f"nothing came back within {options.connect_timeout + _PROBE_WITHIN:.0f} s")
    after = time.time()
    for line in reversed(out.splitlines()):
        if line.startswith(_MARKER):
            try:
                probed = msgspec.json.decode(line[len(_MARKER) :], type=Probed)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as error:
                return _Said(ssh=f"what came back is not what the probe says: {error}")
            # The host's clock was read somewhere in between, most likely towards the end.
            ahead = max(0.0, probed.time - after) or min(0.0, probed.time - before)
            return _Said(probed=probed, seconds=after - before, offset=ahead)
        if line.startswith(NO_PYTHON):
            found = line[len(NO_PYTHON) :].decode(errors="replace").strip(", ")
            return _Said(python=f"no Python 3.10 or newer: found {printable(found) or 'none'}")
    return _Said(ssh=why(err, status, options.connect_timeout)[0])


async def _run(command: Command, given: bytes, within: float) -> tuple[int | None, bytes, bytes]:
    """Run a command in a group of its own; its status, output and errors. Raises OSError, TimeoutError."""
    pipe = asyncio.subprocess.PIPE
    process = await asyncio.create_subprocess_exec(
        *command.argv, stdin=pipe, stdout=pipe, stderr=pipe, env=command.env, start_new_session=True
    )
    if not (process.stdin and process.stdout and process.stderr):
        raise RuntimeError("ssh was started without pipes")
    try:
        async with asyncio.timeout(within):
            process.stdin.write(given)
            out, err = await asyncio.gather(_all(process.stdout), _all(process.stderr))
            with contextlib.suppress(ConnectionError):
                process.stdin.close()
                await process.stdin.wait_closed()
            return await process.wait(), out, err
    finally:
        if process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            await process.wait()


async def _all(stream: asyncio.StreamReader) -> bytes:
    found = bytearray()
    while len(found) < _MOST and (part := await stream.read(1 << 16)):
        found += part
    return bytes(found)
