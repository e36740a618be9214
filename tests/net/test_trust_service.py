"""Whom the service hears, on its client socket and on the tree, and where the fleet's secrets are."""

from __future__ import annotations

import base64
import os
import signal
import socket
import stat
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import zmq

from agent.identity import HostDirectory
from agent.keyring import to_text
from agent.links import endpoint
from controller import api
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.commands import Command, Run
from protocol.limits import CHUNK, MAX_FRAME, MAX_INLINE
from protocol.messages import Ask, Attach, Attached, Chunk, Deliver, Link, Manner, NoChunk, Outcomes
from protocol.outcomes import Exited, Fold, Output
from protocol.trust import Signer
from tests.net.liar import Child, Keys
from tests.net.localfleet import LocalFleet, local_fleet
from tests.waiting import wait_until

DEADLINE_S = 20.0
#: A user who is nobody's in particular (nobody on Debian).
OTHER_UID = 65_534


@pytest.fixture(scope="module")
def fleet() -> Iterator[LocalFleet]:
    """A service and three agents, in a directory that other users can reach the way to."""
    with tempfile.TemporaryDirectory(prefix="canopy-") as home:
        Path(home).chmod(0o755)
        with local_fleet(Path(home), ["h0", "h1", "h2"], 2) as started:
            yield started


@pytest.fixture(autouse=True)
def _unhurt(fleet: LocalFleet) -> Iterator[None]:
    """After each test the same service serves its clients as before."""
    yield
    assert fleet.service is not None
    assert fleet.service.poll() is None
    assert fleet.answers("echo $CANOPY_HOST", ["h0"]) == {"h0": b"h0\n"}
    assert "Traceback" not in (fleet.session.directory / "service.log").read_text()


def client_socket(fleet: LocalFleet) -> Path:
    return fleet.session.directory / "client.sock"


# --- the client socket ------------------------------------------------------------------------------------------------


#: Says a request and prints what came back, or what went wrong.
_CLIENT = """
import contextlib, socket, sys
try:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(20)
        sock.connect(sys.argv[1])
        with contextlib.suppress(BrokenPipeError):  # it may have hung up already, with its reason
            sock.sendall(bytes.fromhex(sys.argv[2]))
        print(sock.recv(1 << 20).hex())
except OSError as error:
    print(type(error).__name__)
"""


def _ask_as_other_user(path: Path) -> str:
    """What the service says to a process of another user."""
    done = subprocess.run(
        ["/usr/bin/python3", "-c", _CLIENT, str(path), api.pack(api.GetStatus()).hex()],
        user=OTHER_UID,
        group=OTHER_UID,
        extra_groups=[],
        cwd="/",
        env={},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    return done.stdout.strip()


def exchange(sock: socket.socket, data: bytes) -> api.Reply | None:
    """Send bytes; the reply, or None where the connection was closed without one."""
    with suppress(BrokenPipeError, ConnectionResetError):
        sock.sendall(data)
    received = b""
    with suppress(ConnectionResetError):
        while more := sock.recv(1 << 16):
            received += more
            if len(received) >= 4 and len(received) >= 4 + int.from_bytes(received[:4], "big"):
                return api.unpack_reply(received[4 : 4 + int.from_bytes(received[:4], "big")])
    return None


def test_the_client_socket_is_its_users_own(fleet: LocalFleet) -> None:
    assert stat.S_IMODE(client_socket(fleet).stat().st_mode) == 0o600
    assert stat.S_IMODE(fleet.session.directory.stat().st_mode) == 0o700


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_another_user_is_refused(fleet: LocalFleet) -> None:
    path = client_socket(fleet)
    assert _ask_as_other_user(path) == "PermissionError"
    # And where somebody opened the way, the service itself asks the kernel who is there.
    path.chmod(0o666)
    path.parent.chmod(0o711)
    try:
        reply = api.unpack_reply(bytes.fromhex(_ask_as_other_user(path))[4:])
    finally:
        path.chmod(0o600)
        path.parent.chmod(0o700)
    assert isinstance(reply, api.Failed)
    assert reply.status == int(ExitStatus.REFUSED)


def _framed(body: bytes) -> bytes:
    return len(body).to_bytes(4, "big") + body


GARBAGE = {
    "random": _framed(os.urandom(300)),
    "empty": _framed(b""),
    "no request": _framed(b"\x81\xa4type\xa7nothing"),
    "a reply": api.pack(api.Done()),
    "trailing bytes": _framed(bytes(api.pack(api.GetStatus())[4:]) + b"\0"),
    "false length inside": _framed(b"\xdd\xff\xff\xff\xff"),
    "deep": _framed(b"\x91" * 100_000),
    "oversize": (api.MAX_LENGTH + 1).to_bytes(4, "big") + bytes(1_000),
    "largest number": b"\xff\xff\xff\xff" + bytes(1_000),
    "text": b"GET / HTTP/1.1\r\nHost: canopy\r\n\r\n",
    "cancel of nothing": api.pack(api.Cancel()),
}


@pytest.mark.parametrize("data", GARBAGE.values(), ids=GARBAGE)
def test_a_malformed_request_is_answered_with_one_sentence(fleet: LocalFleet, data: bytes) -> None:
    with socket.socket(socket.AF_UNIX) as sock:
        sock.settimeout(DEADLINE_S)
        sock.connect(str(client_socket(fleet)))
        reply = exchange(sock, data)
    assert isinstance(reply, api.Failed)
    assert reply.status == int(ExitStatus.USAGE)


def test_clients_that_say_half_a_request_keep_nobody_waiting(fleet: LocalFleet) -> None:
    whole = api.pack(api.GetStatus())
    held = []
    try:
        for length in range(200):
            sock = socket.socket(socket.AF_UNIX)
            held.append(sock)
            sock.connect(str(client_socket(fleet)))
            sock.sendall(whole[: length % len(whole)])
        assert len(fleet.session.status().hosts) >= 3
        assert fleet.answers("true", ["h1"]) == {"h1": b""}
    finally:
        for sock in held:
            sock.close()


# --- the tree ---------------------------------------------------------------------------------------------------------


class Member:
    """A host that was taken in and that the test plays: it hangs below the service."""

    def __init__(self, fleet: LocalFleet, context: zmq.Context[Any], name: str) -> None:
        self.fleet, self.context, self.name = fleet, context, name
        self.keys = Keys()
        fleet.session.enrol(
            api.Enrol(
                name=name, site="", key=to_text(self.keys.public), address=fleet.address,
                control_port=1, bulk_port=1, digest="", facts={},
            )
        )  # fmt: skip
        self.rank = fleet.hosts()[name].rank
        self.nodes: list[Child] = []

    def connect(self, *, bulk: bool = False, keys: Keys | None = None) -> Child:
        root = HostDirectory(self.fleet.session.directory / "root").identity()
        where = endpoint(self.fleet.address, root.bulk_port if bulk else root.control_port)
        child = Child(self.context, where, root.public, keys or self.keys, self.rank, above=None)
        self.nodes.append(child)
        return child

    def attached(self) -> Child:
        child = self.connect()
        child.attach()
        self.until(lambda: child.all(Attached), "the attachment")
        return child

    def until(self, condition: Callable[[], object], what: str) -> None:
        def pumped() -> object:
            for node in self.nodes:
                node.pump()
            return condition()

        wait_until(pumped, DEADLINE_S, what)


@pytest.fixture(scope="module")
def context() -> Iterator[zmq.Context[Any]]:
    made: zmq.Context[Any] = zmq.Context()
    yield made
    made.destroy(linger=0)


_numbers = iter(range(100))


@pytest.fixture
def member(fleet: LocalFleet, context: zmq.Context[Any]) -> Iterator[Member]:
    """A member that no test has used."""
    made = Member(fleet, context, f"liar{next(_numbers)}")
    yield made
    for node in made.nodes:
        node.close()


def test_the_service_refuses_an_unknown_key(member: Member) -> None:
    for bulk in (False, True):
        stranger = member.connect(bulk=bulk, keys=Keys())
        stranger.attach()
        member.until(lambda: stranger.ended, "the refusal")  # noqa: B023
        assert not stranger.connected
    assert not member.fleet.hosts()[member.name].up


def test_no_child_commands_the_service_or_the_fleet(fleet: LocalFleet, member: Member, tmp_path: Path) -> None:
    child = member.attached()
    everybody = ranks.pack(ranks.union(host.rank for host in fleet.hosts().values()))
    now = time.time_ns() // 10**6
    command = Command(
        fleet=fleet.session.status().fleet,
        id=10**9,
        targets=everybody,
        issued_ms=now,
        expires_ms=now + 60_000,
        body=Run(argv=("touch", str(tmp_path / "ran")), output_limit=0),
    )
    # Signed by the fleet's own key: the direction alone is wrong.
    signer = Signer((fleet.session.directory / "fleet.key").read_bytes())
    child.send(Deliver(command.id, everybody, None, Manner.WORK, *signer.command(command)))
    member.until(lambda: child.ended, "the child to be cut off")
    fleet.answers("true", ["h0", "h1", "h2"])
    assert not (tmp_path / "ran").exists()


def test_nobody_attaches_to_the_service_as_another(fleet: LocalFleet, member: Member) -> None:
    victim = fleet.hosts()["h0"]
    child = member.connect()
    child.attach(rank=victim.rank)
    member.until(lambda: child.ended, "the child to be cut off")
    assert fleet.hosts()["h0"].up
    assert fleet.hosts()["h0"].since_s is not None
    assert not fleet.hosts()[member.name].up


def test_an_outcome_that_another_host_forged_is_not_believed(fleet: LocalFleet, member: Member, tmp_path: Path) -> None:
    child = member.attached()
    gate = tmp_path / "gate"
    job = fleet.session.run(f"while [ ! -e {gate} ]; do sleep 0.05; done; echo true; exit 4", ["h0", "h1"])
    both = ranks.pack(ranks.union(host.rank for host in fleet.hosts().values() if host.name in ("h0", "h1")))
    child.send(Outcomes(job.id, (Fold(both, Exited(0), Output(out=b"forged")),)))
    child.send(Attach(1, 1, (Link(member.rank, None, 1, 10**6, True),)))
    member.until(lambda: child.ended or len(child.all(Attached)) == 2, "what was said to be dealt with")
    gate.touch()
    assert [(result.outcome, result.stdout) for result in job.results()] == [(Exited(4), b"true\n")]


def test_no_host_reads_what_is_pushed_to_others(fleet: LocalFleet, member: Member, tmp_path: Path) -> None:
    member.attached()
    secret = tmp_path / "secret"
    secret.write_bytes(os.urandom(max(MAX_INLINE + 1, 3 * CHUNK)))
    # The push stays open as long as its target is frozen, and its chunks could be asked for all the while.
    os.kill(fleet.pid("h0"), signal.SIGSTOP)
    try:
        job = fleet.session.push(secret, str(tmp_path / "copy"), ["h0"])
        curious = member.connect(bulk=True)
        curious.send(Ask(job.id, (0,)))
        member.until(lambda: curious.ended or curious.all(NoChunk) or curious.all(Chunk), "an answer")
        assert not curious.all(Chunk)
    finally:
        os.kill(fleet.pid("h0"), signal.SIGCONT)
    assert all(result.ok for result in job.results())
    assert (tmp_path / "copy").read_bytes() == secret.read_bytes()


@pytest.mark.parametrize("bulk", [False, True], ids=["control", "bulk"])
def test_garbage_costs_its_sender_the_connection_to_the_service(member: Member, bulk: bool) -> None:
    child = member.connect(bulk=True) if bulk else member.attached()
    child.raw(os.urandom(10), os.urandom(1_000))
    member.until(lambda: child.ended, "the child to be cut off")


def test_an_oversize_frame_costs_its_sender_the_connection_to_the_service(member: Member) -> None:
    child = member.attached()
    child.raw(b"\x92\x01\x04", bytes(MAX_FRAME + 1))
    member.until(lambda: child.ended, "the child to be cut off")


def test_one_key_is_one_host(fleet: LocalFleet, member: Member) -> None:
    with pytest.raises(CtlError, match="has the key of"):
        fleet.session.enrol(
            api.Enrol(
                name="twin", site="", key=to_text(member.keys.public), address=fleet.address,
                control_port=1, bulk_port=1, digest="", facts={},
            )
        )  # fmt: skip


def test_a_host_that_left_does_not_come_back_by_itself(
    fleet: LocalFleet, context: zmq.Context[Any], tmp_path: Path
) -> None:
    name = "h2"
    rank = fleet.hosts()[name].rank
    identity = fleet.directory(name).identity()
    (result,) = fleet.session.down([name]).results()
    assert result.ok
    assert fleet.agents[name].wait(DEADLINE_S) == 0
    assert name not in fleet.hosts()
    began = len(fleet.log(name))
    fleet.start(name)
    refusal = "it does not admit this host's key"
    wait_until(lambda: refusal in fleet.log(name)[began:], DEADLINE_S, "the old agent to be refused")
    assert "attached to" not in fleet.log(name)[began:]
    # Nor with another program in its place, at any address of the service.
    root = HostDirectory(fleet.session.directory / "root").identity()
    keys = Keys((identity.public, identity.secret))
    for port in (root.control_port, root.bulk_port):
        old = Child(context, endpoint(fleet.address, port), root.public, keys, rank, above=None)
        try:
            old.attach()

            def refused(old: Child = old) -> bool:
                old.pump()
                return old.ended

            wait_until(refused, DEADLINE_S, "the old key to be refused")
            assert not old.connected
        finally:
            old.close()
    fleet.answers(f"touch {tmp_path}/$CANOPY_HOST", ["h0", "h1"])
    assert {path.name for path in tmp_path.iterdir()} == {"h0", "h1"}
    assert name not in fleet.hosts()


# --- secrets ----------------------------------------------------------------------------------------------------------


def _forms(secret: bytes) -> list[bytes]:
    """A key in every form in which somebody may have written it."""
    forms = [secret, secret.hex().encode(), secret.hex().upper().encode(), repr(secret)[2:-1].encode()]
    forms += [base64.b64encode(secret).rstrip(b"="), base64.urlsafe_b64encode(secret).rstrip(b"=")]
    return [*forms, to_text(secret).encode()]


def _secrets(fleet: LocalFleet) -> dict[Path, bytes]:
    """Each file that holds a secret, and the secret."""
    directory = fleet.session.directory
    hosts = [directory / "root", *(fleet.directory(name).path for name in fleet.names)]
    found = {host / "identity": HostDirectory(host).identity().secret for host in hosts}
    return found | {directory / "fleet.key": (directory / "fleet.key").read_bytes()}


def test_secret_keys_are_where_they_were_made_and_nowhere_else(fleet: LocalFleet, tmp_path: Path) -> None:
    fleet.answers("true", ["h0", "h1"])
    (tmp_path / "file").write_bytes(b"x" * 100_000)
    assert all(result.ok for result in fleet.session.push(tmp_path / "file", "@/file", ["h0", "h1"]).results())
    secrets = _secrets(fleet)
    for file, secret in secrets.items():
        assert stat.S_IMODE(file.stat().st_mode) == 0o600, file
        assert len(secret) == 32
    files = [path for path in fleet.session.directory.rglob("*") if path.is_file()]
    assert len(files) > len(secrets)
    for path in files:
        content = path.read_bytes()
        for file, secret in secrets.items():
            told = [form for form in _forms(secret) if form in content]
            assert not told or path == file, f"{path} has the secret of {file}"


def test_secret_keys_are_in_no_processes_arguments_or_environment(fleet: LocalFleet) -> None:
    secrets = _secrets(fleet)
    pids = fleet.processes()
    assert len(pids) >= 3
    for pid in pids:
        for what in ("cmdline", "environ"):
            content = Path(f"/proc/{pid}/{what}").read_bytes()
            assert not [form for secret in secrets.values() for form in _forms(secret) if form in content]


def test_only_its_user_reads_what_is_private_in_a_hosts_directory(fleet: LocalFleet) -> None:
    directory = fleet.directory("h0")
    assert stat.S_IMODE(directory.spool.stat().st_mode) == 0o700
    assert stat.S_IMODE(directory.parts.stat().st_mode) == 0o700
    # QEMU runs as another user, and must get through to images and disks; it may list nothing.
    assert stat.S_IMODE(directory.path.stat().st_mode) == 0o711
    readable = [path.name for path in directory.path.iterdir() if path.is_file() and path.stat().st_mode & 0o044]
    assert set(readable) <= {"agent.log", "file", "vms.hosts", "lock"}
