"""Parents and children that may lie: raw ZeroMQ sockets with keys of their own, around one real agent.

A `Stage` sets an agent process between a parent and children that the test plays. Nothing here checks anything: what a
test sends goes out as it is.
"""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import zmq
from msgspec.structs import replace
from zmq.utils.monitor import parse_monitor_message

from agent.identity import HostDirectory, Identity, Welcome
from agent.keyring import new_keys, to_text
from agent.links import endpoint
from agent.ports import free_ports
from protocol import codec, ranks
from protocol.commands import Below, Body, Command, Hop, Member, Plan, Push
from protocol.messages import (
    Attach,
    Attached,
    Beat,
    Chunk,
    ClockAsk,
    Deliver,
    Link,
    Manner,
    Message,
    Outcomes,
)
from protocol.outcomes import Fold, Outcome
from protocol.trust import Signer
from tests.net.localfleet import MARK, start_python

FLEET = "stage"
#: Nothing here takes longer than a few seconds by itself, on a machine that others load too.
DEADLINE_S = 20.0
#: The agent under test.
AGENT = 1

T = TypeVar("T")
M = TypeVar("M", bound=Message)


class Keys:
    """A CURVE key pair, raw, by default a fresh one."""

    def __init__(self, pair: tuple[bytes, bytes] | None = None) -> None:
        self.public, self.secret = pair or new_keys()


_epochs = itertools.count(1)


def new_epoch() -> int:
    """A number for an attachment, later than all before."""
    return next(_epochs)


def _curve(sock: zmq.Socket[bytes], keys: Keys) -> None:
    sock.curve_publickey = to_text(keys.public).encode()
    sock.curve_secretkey = to_text(keys.secret).encode()


_monitors = itertools.count()


def monitor(sock: zmq.Socket[bytes]) -> zmq.Socket[bytes]:
    """The socket's events; under a name of its own, since descriptors' numbers are used again."""
    return sock.get_monitor_socket(addr=f"inproc://test-monitor-{next(_monitors)}")


class _Node:
    """A socket, what it heard, and whether its connection ended."""

    def __init__(self, sock: zmq.Socket[bytes]) -> None:
        self.socket = sock
        self.socket.linger = 0
        self.heard: list[Message] = []
        self.chunks: dict[tuple[int, int], bytes] = {}
        self.ended = False
        self.connected = False
        self._monitor = monitor(sock)

    def pump(self) -> None:
        """Take in what there is."""
        with suppress(zmq.Again):
            while True:
                self._take(self.socket.recv_multipart(zmq.NOBLOCK))
        with suppress(zmq.Again):
            while True:
                event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
                if event == zmq.Event.HANDSHAKE_SUCCEEDED:
                    self.connected = True
                elif event in (
                    zmq.Event.DISCONNECTED,
                    zmq.Event.HANDSHAKE_FAILED_AUTH,
                    zmq.Event.HANDSHAKE_FAILED_PROTOCOL,
                    zmq.Event.HANDSHAKE_FAILED_NO_DETAIL,
                ):
                    self.ended = True

    def _take(self, frames: list[bytes]) -> None:
        message, blob = codec.decode(frames)
        self.heard.append(message)
        if isinstance(message, Chunk) and blob is not None:
            self.chunks[message.id, message.index] = blob

    def all(self, kind: type[M]) -> list[M]:
        """Everything of one kind that was heard."""
        return [message for message in self.heard if isinstance(message, kind)]

    def close(self) -> None:
        self.socket.disable_monitor()
        self._monitor.close(0)
        self.socket.close(0)


class Child(_Node):
    """Somebody who connects. `rank` is whose key it has, if anybody's, and `above` the rank of whom it connects to."""

    def __init__(
        self, context: zmq.Context[Any], where: str, server: bytes, keys: Keys, rank: int, *,
        above: int | None = AGENT, route: bytes = b"",
    ) -> None:  # fmt: skip
        """`where` is an endpoint and `server` the key that is expected there."""
        sock = context.socket(zmq.DEALER)
        if route:
            sock.setsockopt(zmq.ROUTING_ID, route)
        sock.setsockopt(zmq.RECONNECT_IVL, -1)
        sock.curve_serverkey = to_text(server).encode()
        _curve(sock, keys)
        super().__init__(sock)
        self.rank, self._above = rank, above
        sock.connect(where)

    def send(self, message: Message, blob: bytes | None = None) -> None:
        """Send a message as the codec writes it."""
        self.raw(*codec.encode(message, blob))

    def raw(self, *frames: bytes) -> None:
        """Send frames; where the connection is over, nothing is sent."""
        with suppress(zmq.Again):
            self.socket.send_multipart(frames, zmq.NOBLOCK)

    def attach(self, *below: Link, rank: int | None = None, parent: int | None = -1) -> None:
        """Attach, as oneself or as `rank`, to whom one is connected to or to `parent`."""
        above = self._above if parent == -1 else parent
        own = Link(self.rank if rank is None else rank, above, 1, new_epoch(), True)
        self.send(Attach(1, 1, (own, *below)))


class Parent(_Node):
    """Whom the agent connects to: its control and its bulk address. It admits everybody."""

    def __init__(self, stage: Stage, keys: Keys, ports: list[int]) -> None:
        self._stage = stage
        self.keys = keys
        self.rank: int | None = None
        self.answers = {Attach, Beat, ClockAsk}
        self._routes: dict[str, bytes] = {}
        self.bulk_heard: list[Message] = []
        super().__init__(self._listen(ports[0]))
        self.bulk = self._listen(ports[1])

    def _listen(self, port: int) -> zmq.Socket[bytes]:
        sock: zmq.Socket[bytes] = self._stage.context.socket(zmq.ROUTER)
        sock.linger = 0
        sock.curve_server = True
        _curve(sock, self.keys)
        sock.bind(endpoint(self._stage.address, port))
        return sock

    def _take(self, frames: list[bytes]) -> None:
        self._routes["control"] = frames[0]
        message, _ = codec.decode(frames[1:])
        self.heard.append(message)
        if type(message) not in self.answers:
            return
        if isinstance(message, Attach):
            self.send(Attached(1, message.links[0].epoch))
        elif isinstance(message, Beat):
            self.send(Beat())
        elif isinstance(message, ClockAsk):
            self.send(self._stage.signer.clock(FLEET, message.rank, message.nonce, self._stage.now_ms()))

    def pump(self) -> None:
        super().pump()
        with suppress(zmq.Again):
            while True:
                route, *frames = self.bulk.recv_multipart(zmq.NOBLOCK)
                self._routes["bulk"] = route
                self.bulk_heard.append(codec.decode(frames)[0])

    def send(self, message: Message) -> None:
        """Down the control link."""
        self.raw(*codec.encode(message))

    def raw(self, *frames: bytes) -> None:
        """Frames down the control link."""
        self.socket.send_multipart([self._routes["control"], *frames], zmq.NOBLOCK)

    def send_chunk(self, id_: int, index: int, blob: bytes) -> None:
        """Down the bulk link."""
        self.bulk.send_multipart([self._routes["bulk"], *codec.encode(Chunk(id_, index), blob)], zmq.NOBLOCK)

    def outcomes(self, id_: int) -> dict[int, list[Outcome]]:
        """Every outcome that was heard for a command, by rank."""
        found: dict[int, list[Outcome]] = {}
        for fold in self.folds(id_):
            for rank in ranks.each(ranks.unpack(fold.ranks)):
                found.setdefault(rank, []).append(fold.outcome)
        return found

    def folds(self, id_: int) -> list[Fold]:
        """Every fold that was heard for a command."""
        return [fold for message in self.all(Outcomes) if message.id == id_ for fold in message.folds]

    def close(self) -> None:
        super().close()
        self.bulk.close(0)


class Stage:
    """A real agent of rank 1 between a parent and children that the test plays. The test has the fleet's key."""

    def __init__(self, folder: Path, address: str, children: Iterable[int], grandchildren: dict[int, int]) -> None:
        """`grandchildren` maps a rank to the child that it is planned below."""
        self.address = address
        self.context: zmq.Context[Any] = zmq.Context()
        self.signer = Signer(os.urandom(32))
        self.directory = HostDirectory(folder / "agent")
        self.identity: Identity = self.directory.enrol(address)
        self.keys = {rank: Keys() for rank in (*children, *grandchildren)}
        self.below = dict.fromkeys(children, AGENT) | grandchildren
        self.version = 1
        self._ports = free_ports(address, 2)
        self._parent_keys = Keys()
        self._nodes: list[_Node] = []
        self._next = 1_000
        self._mark = os.urandom(8).hex()
        self.process: subprocess.Popen[bytes] | None = None
        self.parent = Parent(self, self._parent_keys, self._ports)
        self._nodes.append(self.parent)
        payload, signature = self.sign(self.plan())
        welcome = Welcome(fleet=FLEET, verify_key=self.signer.verify_key, payload=payload, signature=signature)
        (self.directory.path / "welcome").write_bytes(msgspec.msgpack.encode(welcome))

    # --- the agent ----------------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Start the agent, and wait until it is attached and knows the time."""
        seen = len(self.parent.all(ClockAsk))
        self.start_unattended()
        self.until(lambda: len(self.parent.all(ClockAsk)) > seen, "the agent to attach")

    def start_unattended(self) -> None:
        """Start the agent."""
        path = self.directory.path
        self.process = start_python(["-m", "agent", "run", "--dir", str(path)], path / "agent.log", {MARK: self._mark})

    def kill(self) -> None:
        """Kill the agent with -9."""
        assert self.process is not None
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()

    def log(self) -> str:
        """What the agent wrote."""
        return (self.directory.path / "agent.log").read_text()

    # --- what the fleet's key says ------------------------------------------------------------------------------------

    def now_ms(self) -> int:
        """The root's clock."""
        return time.time_ns() // 1_000_000

    def plan(self) -> Plan:
        """The agent's part of the membership."""
        control, bulk = self._ports
        identity = self.identity
        return Plan(
            version=self.version,
            you=Member(AGENT, "agent", self.address, identity.control_port, identity.bulk_port, identity.public),
            ancestors=(Member(None, "service", self.address, control, bulk, self._parent_keys.public),),
            below=tuple(Below(rank, parent, self.keys[rank].public) for rank, parent in sorted(self.below.items())),
        )

    def new_id(self) -> int:
        """A number that no command has yet."""
        self._next += 1
        return self._next

    def order(self, hosts: Iterable[int]) -> tuple[Hop, ...]:
        """The order of a push to these: the agent first."""
        others = [Hop(rank, self.address, 1, self.keys[rank].public) for rank in sorted(hosts) if rank != AGENT]
        return (Hop(AGENT, self.address, self.identity.bulk_port, self.identity.public), *others)

    def sign(
        self,
        body: Body,
        *,
        id_: int | None = None,
        targets: Iterable[int] = (AGENT,),
        signer: Signer | None = None,
        fleet: str = FLEET,
        issued_ms: int | None = None,
        expires_ms: int | None = None,
    ) -> tuple[bytes, bytes]:
        """A signed command: payload and signature."""
        now = self.now_ms()
        if isinstance(body, Push) and body.stream.inline is None:
            body = replace(body, stream=replace(body.stream, order=self.order(targets)))
        command = Command(
            fleet=fleet,
            id=self.new_id() if id_ is None else id_,
            targets=ranks.pack(ranks.union(targets)),
            issued_ms=now if issued_ms is None else issued_ms,
            expires_ms=now + 60_000 if expires_ms is None else expires_ms,
            body=body,
        )
        return (signer or self.signer).command(command)

    def delivery(
        self, body: Body, *, to: Iterable[int] = (AGENT,), manner: Manner = Manner.WORK, **signed: Any
    ) -> Deliver:
        """A command on its way: `to` is what its header says, `signed` goes to `sign`."""
        id_ = signed.pop("id_", None) or self.new_id()
        payload, signature = self.sign(body, id_=id_, **signed)
        return Deliver(id_, ranks.pack(ranks.union(to)), None, manner, payload, signature)

    # --- others -------------------------------------------------------------------------------------------------------

    def child(self, rank: int, **options: Any) -> Child:
        """Connect with the key of that rank."""
        return self.stranger(self.keys[rank], rank, **options)

    def stranger(self, keys: Keys, rank: int = -1, *, bulk: bool = False, route: bytes = b"") -> Child:
        """Connect with any key."""
        port = self.identity.bulk_port if bulk else self.identity.control_port
        where = endpoint(self.address, port)
        child = Child(self.context, where, self.identity.public, keys, rank, route=route)
        self._nodes.append(child)
        return child

    def attached(self, rank: int, *below: Link) -> Child:
        """A child that is attached."""
        child = self.child(rank)
        child.attach(*below)
        self.until(lambda: child.all(Attached), f"rank {rank} to be attached")
        return child

    # --- time ---------------------------------------------------------------------------------------------------------

    def pump(self) -> None:
        """Let everybody hear what there is."""
        for node in self._nodes:
            node.pump()

    def until(self, condition: Callable[[], T | None], what: str, within: float = DEADLINE_S) -> T:
        """Play everybody's part until the condition is true."""
        deadline = time.monotonic() + within
        while True:
            self.pump()
            value = condition()
            if value:
                return value
            if time.monotonic() > deadline:
                raise AssertionError(f"waited {within:g} s in vain for {what}; the agent's log: {self.log()[-2_000:]}")
            self.parent.socket.poll(5)

    def leave(self, *nodes: _Node) -> None:
        """Close connections."""
        for node in nodes:
            node.close()
            self._nodes.remove(node)

    def close(self) -> None:
        """End everything."""
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        for node in self._nodes:
            node.close()
        self.context.destroy(linger=0)
