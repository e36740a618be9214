"""The seed: what an SSH session runs on a bare host to make an agent of it.

It comes in through standard input, so it is one file on the standard library alone, for Python 3.10 and
later. It says what it finds, takes the bundle if the host lacks it, has the agent make its keys, sends
their public half up, stores the welcome that comes back, and starts the agent. Then it asks for hosts to
start in its turn, with the starter that came in the bundle.

Frames, both ways: four bytes of length (big-endian), a JSON object, and where that has a `blob` as many bytes more.
Ahead of the first frame, standard output may hold what the host's login scripts print; a line of its own ends that.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import io
import json
import os
import pwd
import re
import select
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path
from typing import Any

MARKER = b"CANOPY-SEED 1"
MAX_HEADER = 1 << 20  # a share of 64 hosts with their keys is 100 kB
MAX_BLOB = 64 << 20  # bundles are 2 to 4 MB
MAX_UNPACKED = 256 << 20
ENROL_DEADLINE = 60.0  # seconds; it takes 0.2 on an idle host
START_DEADLINE = 60.0  # for the agent to be ready; it takes 0.3 on an idle host
STOP_DEADLINE = 15.0  # for an agent to end its commands before it is killed
SILENCE = 300.0  # without a word from the parent for so long, it is gone: a pulled cable tells nobody
BUSY_GRACE = 5.0  # for another seed on this host to finish, before it is ended
BUSY_DEADLINE = 20.0
POLL = 0.05  # seconds between looks at a lock or a process that is about to end
KEEP_LOG = 1 << 20  # bytes of agent.log beyond which a start begins a new one
FLEET = re.compile(r"[a-z0-9][a-z0-9_.-]{0,63}")
DIGEST = re.compile(r"[0-9a-f]{32,64}")

# User=root: without it systemd sets no HOME. Type=notify and WatchdogSec: the agent's event loop says that it
# is ready and alive. KillMode=mixed: the agent is asked first and ends its commands in order, then whatever is
# left in its group is killed; "process" leaves orphans, "control-group" cuts down a package upgrade that runs
# as a command. VMs belong to libvirt and live in machine.slice.
UNIT = """[Unit]
Description=Canopy agent of fleet {fleet}
After=network-online.target
Wants=network-online.target
StartLimitIntervalSec=0

[Service]
User=root
Type=notify
NotifyAccess=main
ExecStart={python} -m agent run --dir {directory}
Environment=PYTHONPATH={directory}/current
WorkingDirectory={directory}
StandardOutput=append:{directory}/agent.log
StandardError=append:{directory}/agent.log
WatchdogSec=30
Restart=always
RestartSec={restart}
KillMode=mixed
TimeoutStopSec=20
OOMScoreAdjust=-500
LimitNOFILE=65536
TasksMax=infinity

[Install]
WantedBy=multi-user.target
"""


class Failure(Exception):
    """This host cannot be started; the message is one sentence, equal on all hosts with the same trouble."""


def read_exactly(size: int) -> bytes:
    """`size` bytes from the parent. Ends the seed when the parent is gone: nobody is there to tell."""
    parts = bytearray()
    while len(parts) < size:
        if not select.select([0], [], [], SILENCE)[0]:
            sys.exit(1)
        part = os.read(0, min(size - len(parts), 1 << 18))
        if not part:
            sys.exit(1)
        parts += part
    return bytes(parts)


def receive() -> tuple[dict[str, Any], bytes]:
    """The next frame: its header and its blob."""
    size = int.from_bytes(read_exactly(4), "big")
    if size > MAX_HEADER:
        raise Failure("the seed was sent a header over its limit: the versions of ctl and seed differ")
    header = json.loads(read_exactly(size))
    blob = header.get("blob", 0)
    if not 0 <= blob <= MAX_BLOB:
        raise Failure("the seed was sent a blob over its limit: the versions of ctl and seed differ")
    return header, read_exactly(blob)


def send(header: dict[str, Any]) -> None:
    """Send one frame to the parent."""
    content = json.dumps(header).encode()
    rest = memoryview(len(content).to_bytes(4, "big") + content)
    while rest:
        rest = rest[os.write(1, rest) :]


def write_file(path: Path, content: bytes, mode: int) -> None:
    """Put `content` at `path` so that it is there wholly or not at all, also after a power cut."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    with contextlib.suppress(FileNotFoundError):
        temporary.unlink()
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, mode)
    with open(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)
    temporary.replace(path)


def is_locked(path: Path) -> bool:
    """Whether another process holds the flock on `path`."""
    try:
        descriptor = os.open(path, os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return False
    try:
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    finally:
        os.close(descriptor)
    return False


def signal_process(pid: str, word: bytes, sign: signal.Signals) -> None:
    """Signal a process that was noted down, if it is still the one: `word` is among its arguments."""
    with contextlib.suppress(OSError, ValueError):
        if word in Path(f"/proc/{int(pid)}/cmdline").read_bytes().split(b"\0"):
            os.kill(int(pid), sign)


def libc() -> tuple[str, list[int]]:
    """The C library's name and version."""
    try:
        name, _, version = (os.confstr("CS_GNU_LIBC_VERSION") or "").partition(" ")
    except (ValueError, OSError):
        name, version = "", ""
    if name == "glibc":
        return name, [int(part) for part in version.split(".")[:2]]
    musl = any(Path("/lib").glob("ld-musl-*"))
    return ("musl" if musl else "an unknown C library"), [0, 0]


def login_environment() -> dict[str, str]:
    """The environment for processes that outlive the session: the login's, without what belongs to the session."""
    session = ("SSH_", "PYTHON", "XDG_SESSION", "XDG_RUNTIME", "DBUS_", "NOTIFY_")
    return {name: value for name, value in os.environ.items() if not name.startswith(session)}


def unpack(archive: bytes, into: Path) -> None:
    """Unpack a bundle: plain files at plain relative paths, nothing else."""
    left = MAX_UNPACKED
    try:
        with tarfile.open(fileobj=io.BytesIO(archive), mode="r:gz") as entries:
            for entry in entries:
                parts = entry.name.split("/")
                left -= entry.size
                if not entry.isreg() or left < 0 or any(part in ("", ".", "..") or "\0" in part for part in parts):
                    raise Failure("the agent's bundle holds what no bundle holds: nothing was unpacked")
                target = into.joinpath(*parts)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = entries.extractfile(entry)
                target.write_bytes(content.read() if content else b"")
    except (tarfile.TarError, EOFError, zlib.error) as error:
        raise Failure("the agent's bundle cannot be unpacked: it is damaged") from error


class WentBack(Failure):
    """The new agent cannot be started, and the previous one runs again."""


class Host:
    """This host's directory of one fleet, and the agent in it."""

    def __init__(self, fleet: str, base: str) -> None:
        """Create the directory: in /var/lib/canopy for root, else in ~/.canopy; `base` takes their place."""
        if not FLEET.fullmatch(fleet):
            raise Failure("the fleet's id is none: lower-case letters, digits, dots, dashes and underscores")
        self.fleet = fleet
        self.uid = os.geteuid()
        home = Path(pwd.getpwuid(self.uid).pw_dir)
        usual = Path("/var/lib/canopy") if self.uid == 0 else home / ".canopy"
        self.directory = (Path(base) if base else usual) / fleet
        self.bundles = self.directory / "bundle"
        self.systemd = self.uid == 0 and Path("/run/systemd/system").is_dir()
        self.unit = f"canopy-agent-{fleet}.service"
        # QEMU runs as another user and has to reach its VMs' files below; secrets are 0600 each.
        for directory in (self.directory.parent, self.directory, self.bundles):
            directory.mkdir(mode=0o711, parents=True, exist_ok=True)

    def claim(self) -> int:
        """Keep other seeds off this host; returns the descriptor that holds the lock.

        An older seed whose parent vanished without a word would wait on: it has to make way.
        """
        descriptor = os.open(self.directory / "seed.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        began = time.monotonic()
        while True:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                waited = time.monotonic() - began
                if waited > BUSY_DEADLINE:
                    raise Failure("another bootstrap is at work on this host: wait for it to end") from None
                if waited > BUSY_GRACE:
                    signal_process(self.text("seed.lock"), b"-I", signal.SIGTERM)
                time.sleep(POLL)
            else:
                os.ftruncate(descriptor, 0)
                os.write(descriptor, str(os.getpid()).encode())
                return descriptor

    def sweep(self) -> None:
        """Remove what an earlier seed left half done."""
        for leftover in (*self.bundles.glob(".tmp-*"), *self.directory.glob("starter-*")):
            shutil.rmtree(leftover, ignore_errors=True)

    def text(self, name: str) -> str:
        """A small file's content, or nothing."""
        try:
            return (self.directory / name).read_text().strip()
        except (OSError, UnicodeDecodeError):
            return ""

    def current(self) -> str:
        """The identity of the bundle that the agent is to run from, or nothing."""
        try:
            return (self.directory / "current").readlink().name
        except OSError:
            return ""

    def running(self) -> str:
        """The identity of the bundle that the running agent was started from, or nothing."""
        return self.text("started") if is_locked(self.directory / "lock") else ""

    def stored(self) -> list[str]:
        """The bundles that are unpacked here."""
        return sorted(path.name for path in self.bundles.iterdir() if DIGEST.fullmatch(path.name) and path.is_dir())

    def hello(self) -> dict[str, Any]:
        """What decides about this host."""
        name, version = libc()
        machine, narrow = os.uname().machine, sys.maxsize < 1 << 32
        return {
            "python": list(sys.version_info[:2]),
            "machine": "32-bit " + machine if narrow else machine,
            "libc": name,
            "libc_version": version,
            "uid": self.uid,
            "stored": self.stored(),
            "ssh": shutil.which("ssh") is not None and "SSH_AUTH_SOCK" in os.environ,
        }

    def store(self, identity: str, digest: str, archive: bytes) -> None:
        """Check the bundle, unpack it, and keep its archive for the hosts that are started from here."""
        if not DIGEST.fullmatch(identity) or hashlib.sha256(archive).hexdigest() != digest:
            raise Failure("the agent's bundle came damaged: its digest is not the one announced")
        temporary = self.bundles / f".tmp-{os.getpid()}"
        try:
            unpack(archive, temporary)
            if not (temporary / "agent" / "__pycache__").is_dir():
                import compileall  # only where the service node runs another Python

                compileall.compile_dir(temporary, quiet=2)
            write_file(self.bundles / f"{identity}.tar.gz", archive, 0o644)
            shutil.rmtree(self.bundles / identity, ignore_errors=True)
            temporary.rename(self.bundles / identity)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)

    def keys(self) -> str:
        """A digest of the agent's identity as it is on disk: it tells when that was replaced."""
        try:
            return hashlib.sha256((self.directory / "identity").read_bytes()).hexdigest()
        except OSError:
            return ""

    def enrolment(self, identity: str, address: str) -> dict[str, Any] | None:
        """The public half of the running agent's identity, if it runs from that bundle and listens at that address."""
        with contextlib.suppress(ValueError):
            known = json.loads(self.text("enrolment.json") or "{}")
            same = self.running() == identity == self.current() == known.get("identity")
            if same and known["address"] == address and known.pop("keys", "") == self.keys():
                return dict(known)
        return None

    def enrol(self, identity: str, address: str) -> dict[str, Any]:
        """Have the agent make its keys, or find them; returns their public half."""
        command = [sys.executable, "-m", "agent", "enrol", "--dir", str(self.directory), "--address", address]
        environment = {**login_environment(), "PYTHONPATH": str(self.bundles / identity)}
        try:
            done = subprocess.run(
                command,
                env=environment,
                cwd=self.directory,
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=ENROL_DEADLINE,
                check=False,
            )
        except subprocess.TimeoutExpired:
            raise Failure(f"the agent did not make its keys within {ENROL_DEADLINE:.0f} s") from None
        try:
            answer = json.loads(done.stdout.strip().splitlines()[-1]) if done.returncode == 0 else {}
            fresh = {name: answer[name] for name in ("key", "control_port", "bulk_port")}
        except (ValueError, LookupError, TypeError):
            # What is unpacked may be broken by a full disk or a power cut: the next try starts afresh.
            shutil.rmtree(self.bundles / identity, ignore_errors=True)
            raise Failure(f"the agent could not make its keys: {last_line(done.stderr)}") from None
        fresh.update(identity=identity, address=address)
        content = json.dumps({**fresh, "keys": self.keys()}).encode()
        write_file(self.directory / "enrolment.json", content, 0o644)
        return fresh

    def stop(self) -> None:
        """End the agent that runs: ask it first, then kill it."""
        lock = self.directory / "lock"
        with contextlib.suppress(FileNotFoundError):
            (self.directory / "started").unlink()
        if self.systemd:
            self.systemctl("stop", self.unit)
        for sign in (signal.SIGTERM, signal.SIGKILL):
            if not is_locked(lock):
                return
            signal_process(self.text("agent.pid"), os.fsencode(self.directory), sign)
            deadline = time.monotonic() + STOP_DEADLINE
            while is_locked(lock) and time.monotonic() < deadline:
                time.sleep(POLL)
        if is_locked(lock):
            raise Failure("the old agent holds its lock and cannot be ended: end it by hand, and run again")

    def previous(self, identity: str) -> str:
        """The bundle to go back to where that of `identity` does not start, or nothing."""
        current = self.current()
        return current if current != identity and current in self.stored() else ""

    def switch(self, identity: str, keep: str = "") -> None:
        """Make DIR/current point to a bundle, and drop the others but what is unpacked of `keep`."""
        link = self.directory / f".current.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            link.unlink()
        link.symlink_to(f"bundle/{identity}")
        link.replace(self.directory / "current")
        for path in self.bundles.iterdir():
            if not path.name.startswith(identity) and path.name != keep:
                shutil.rmtree(path) if path.is_dir() else path.unlink()

    def start(self, identity: str) -> None:
        """Start the agent, and see that it lives."""
        log = self.directory / "agent.log"
        if log.exists() and log.stat().st_size > KEEP_LOG:
            log.replace(self.directory / "agent.log.1")
        log.touch(mode=0o600)
        offset = log.stat().st_size
        if self.systemd:
            self.start_unit(log, offset)
        else:
            self.start_detached(log, offset)
        if not is_locked(self.directory / "lock"):
            raise Failure("the agent says that it is ready but does not hold its lock: see agent.log on the host")
        write_file(self.directory / "started", identity.encode(), 0o644)

    def start_detached(self, log: Path, offset: int) -> None:
        """Start the agent in a session of its own, and wait for READY=1, as systemd would (sd_notify(3))."""
        ready = self.directory / f".notify.{os.getpid()}"
        with contextlib.suppress(FileNotFoundError):
            ready.unlink()
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as inbox, log.open("ab") as output:
            try:
                inbox.bind(str(ready))
                inbox.settimeout(POLL)
                process = subprocess.Popen(
                    [sys.executable, "-m", "agent", "run", "--dir", str(self.directory)],
                    env={
                        **login_environment(),
                        "PYTHONPATH": str(self.directory / "current"),
                        "NOTIFY_SOCKET": str(ready),
                    },
                    cwd=self.directory,
                    stdin=subprocess.DEVNULL,
                    stdout=output,
                    stderr=output,
                    start_new_session=True,
                )
                deadline = time.monotonic() + START_DEADLINE
                said = b""
                while b"READY=1" not in said.split(b"\n"):
                    if process.poll() is not None:
                        told = log.read_bytes()[offset:]
                        raise Failure(f"the agent ended as soon as it was started: {last_line(told)}")
                    if time.monotonic() > deadline:
                        process.kill()
                        raise Failure(f"the agent was not ready within {START_DEADLINE:.0f} s: see its agent.log")
                    with contextlib.suppress(TimeoutError):
                        said = inbox.recv(1024)
            finally:
                ready.unlink(missing_ok=True)

    def start_unit(self, log: Path, offset: int) -> None:
        """Have systemd start the agent, now and at each boot; it waits for READY=1 itself."""
        # Hosts that lose power together must not come back in the same second.
        spread = 1000 + zlib.crc32(os.uname().nodename.encode()) % 2000
        text = UNIT.format(fleet=self.fleet, python=sys.executable, directory=self.directory, restart=f"{spread}ms")
        write_file(Path("/etc/systemd/system") / self.unit, text.encode(), 0o644)
        for words in (["daemon-reload"], ["enable", self.unit], ["restart", self.unit]):
            done = self.systemctl(*words)
            if done.returncode:
                told = log.read_bytes()[offset:]
                self.systemctl("stop", self.unit)
                raise Failure(f"systemd could not start the agent: {last_line(told or done.stderr)}")

    def systemctl(self, *words: str) -> subprocess.CompletedProcess[bytes]:
        """Ask systemd."""
        return subprocess.run(["systemctl", *words], stdin=subprocess.DEVNULL, capture_output=True, check=False)


def last_line(output: bytes) -> str:
    """The last line of some program's output, fit to be shown."""
    lines = output.decode(errors="replace").strip().splitlines()
    return re.sub(r"[^\x20-\x7e]", "?", lines[-1])[:200] if lines else "it said nothing"


def address() -> str:
    """This host's address as the one who logged in knows it (sshd(8), SSH_CONNECTION: its third word)."""
    words = os.environ.get("SSH_CONNECTION", "").split()
    if len(words) != len(("client", "port", "server", "port")):
        raise Failure("sshd does not tell this host's address: SSH_CONNECTION is not set")
    return words[2]


def bring_up(host: Host, begin: dict[str, Any]) -> tuple[str, dict[str, Any]]:
    """Everything from hello to a living agent; returns what it came to, and the frames that tell what this host is."""
    claimed = host.claim()
    host.sweep()
    hello = host.hello()
    send({"t": "hello", "id": begin["id"], **hello})
    install, archive = receive()
    identity = install["identity"]
    if archive:
        host.store(identity, install["sha256"], archive)
    elif identity not in hello["stored"]:
        raise Failure("this host does not have the version that it was to run")
    here = address()
    enrolment = host.enrolment(identity, here)
    outdated = enrolment is None
    if enrolment is None:
        enrolment = host.enrol(identity, here)
    facts = {name: hello[name] for name in ("python", "machine", "libc", "libc_version", "uid")}
    send({"t": "enrol", "id": begin["id"], "running": not outdated, **enrolment, **facts})
    answer, welcome = receive()
    if answer["t"] != "welcome":
        raise Failure(str(answer.get("reason", "the service refused this host")))
    if not (host.directory / "welcome").exists() or (host.directory / "welcome").read_bytes() != welcome:
        write_file(host.directory / "welcome", welcome, 0o600)
    if outdated:
        previous = host.previous(identity)
        host.stop()
        host.switch(identity, keep=previous)
        try:
            host.start(identity)
        except Failure as failure:
            if previous:
                go_back(host, previous, here, {"id": begin["id"], **facts}, str(failure))
            raise
    os.close(claimed)
    return ("started" if outdated else "current"), {**hello, **install}


def go_back(host: Host, previous: str, here: str, facts: dict[str, Any], why: str) -> None:
    """Run the previous agent again, have the service know that, and raise WentBack with the reason."""
    try:
        host.stop()
        host.switch(previous)
        enrolment = host.enrol(previous, here)
        host.start(previous)
    except Failure as failure:
        raise Failure(f"{why}; and the previous version does not run again: {failure}") from failure
    send({"t": "enrol", "running": True, **enrolment, **facts})
    answer, welcome = receive()
    if answer["t"] == "welcome":
        write_file(host.directory / "welcome", welcome, 0o600)
    raise WentBack(f"{why}; the previous version runs again")


def explain(error: OSError, begin: dict[str, Any]) -> str:
    """One sentence for what the system refused; the same on every host."""
    usual = "/var/lib/canopy" if os.geteuid() == 0 else "~/.canopy"
    where = begin["terms"]["directory"] or usual
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left in {where}: make room there"
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return f"{where} cannot be written: {os.strerror(error.errno)}"
    return f"the host's system refused: {error.strerror or error}"


def main() -> None:
    """Bring this host up, then start others."""
    os.umask(0o022)
    os.write(1, b"\n" + MARKER + b"\n")
    begin, _ = receive()
    reason, went_back = "", False
    try:
        terms = begin["terms"]
        host = Host(terms["fleet"], terms["directory"])
        state, mine = bring_up(host, begin)
        send({"t": "result", "id": begin["id"], "state": state})
        if terms["starter"] and mine["ssh"]:
            start_others(host, begin, mine)
        return
    except Failure as failure:
        reason, went_back = str(failure), isinstance(failure, WentBack)
    except BrokenPipeError:
        return
    except OSError as error:
        reason = explain(error, begin)
    with contextlib.suppress(BrokenPipeError):
        send({"t": "result", "id": begin["id"], "state": "failed", "reason": reason, "went_back": went_back})


def start_others(host: Host, begin: dict[str, Any], mine: dict[str, Any]) -> None:
    """Ask for hosts to start, and start them with the starter that the bundle brought."""
    send({"t": "want"})
    more, _ = receive()
    if more["t"] == "jobs":
        sys.path.insert(0, str(host.directory / "current"))
        from agent.starter_host import serve

        serve(host.directory, begin, mine, more)


if __name__ == "__main__":
    main()
