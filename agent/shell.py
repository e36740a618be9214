"""The shell around the relay: it performs effects and feeds events back, and decides nothing.

The root runs in the same one; what differs is the worker that does local work, and who is told the root's news.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from agent.bulk import Bulk, Store
from agent.intake import allow_descriptors
from agent.keyring import BULK, CONTROL, Keyring
from agent.links import Downlink, Uplink
from protocol import codec, events
from protocol.codec import MalformedMessage
from protocol.commands import Body, Feed, Hop, Leave, Member, Push, Run, Stream
from protocol.limits import VERSION_MAX, VERSION_MIN
from protocol.messages import (
    DOWNWARDS,
    UPWARDS,
    Attached,
    Deliver,
    Grant,
    Manner,
    Message,
    Rejected,
)
from protocol.relay import Relay
from protocol.stream import Blob
from protocol.transfer import Role

log = logging.getLogger("canopy")

#: What a departing agent's last messages get, in ms.
_LINGER_MS = 500


class Worker(Store, Protocol):
    """What does a node's local work. Each call returns at once; results come back as events."""

    def start(self, id_: int, body: Body, ttl: float | None) -> None:
        """Begin; say Finished to the shell exactly once."""

    def stop(self, id_: int, *, hard: bool) -> None:
        """End it."""

    def keep(self, outcome: events.Keep) -> None:
        """Write an outcome to disk, and say Kept."""

    def load(self, id_: int, signature: bytes) -> None:
        """Read what was kept of a command, and say Loaded."""

    def type(self, feed: Feed) -> None:
        """Something was typed into a console."""

    def granted(self, id_: int, grant: Grant) -> None:
        """Work may send more of its output."""

    def pour(self, id_: int, offset: int, data: bytes, *, last: bool) -> None:
        """Work gets a piece of its input."""

    def forget(self, ids: tuple[int, ...]) -> None:
        """The root has these outcomes."""

    def arrived(self) -> None:
        """Attached: report everything anew."""

    def depart(self, leave: Leave) -> None:
        """End this agent."""

    def save_plan(self, delivery: Deliver) -> None:
        """Keep this plan for the next start."""

    def tell(self, effect: events.Effect) -> None:
        """The root's news for its clients."""


class Shell:
    """One node: its sockets, its relay, its transfers."""

    def __init__(self, keyring: Keyring, relay: Relay, address: str, control_port: int, bulk_port: int) -> None:
        """Listens at once. Raises OSError where it can't. `worker` must be set before `begin`."""
        self.worker: Worker
        self.relay = relay
        self._keyring = keyring
        self._address = address
        self._loop = asyncio.get_running_loop()
        self._queue: deque[events.Event] = deque()
        self._busy = self._closed = False
        self._timer: asyncio.TimerHandle | None = None
        self._parent: Member | None = None
        #: What was logged of parents that could not be had, since the last that could.
        self._complaints: set[str] = set()
        self._up: Uplink | None = None
        #: The versions that were agreed on with the parent and with each child.
        self._up_version = VERSION_MAX
        self._versions: dict[int, int] = {}
        self._down = Downlink(keyring, CONTROL, address, control_port, heard=self._from_child, lost=self._child_lost)
        self._background = keyring.in_background()
        self._bulk = Bulk(
            self._background, relay, address, bulk_port, store=lambda: self.worker, expel=self._expel, left=self._left
        )

    # --- the relay ----------------------------------------------------------------------------------------------------

    def begin(self) -> None:
        """Start the relay."""
        allow_descriptors()
        self.feed(events.Begin())

    def feed(self, event: events.Event) -> None:
        """Give the relay an event, and do what it wants done. May be called from within an effect."""
        if self._closed:
            return
        self._queue.append(event)
        if self._busy:
            return
        self._busy = True
        try:
            while self._queue:
                for effect in self.relay.handle(self._queue.popleft(), self._loop.time()):
                    self._perform(effect)
        finally:
            self._busy = False
        self._set_timer()

    def _set_timer(self) -> None:
        due = self.relay.next_wakeup()
        if self._timer is not None:
            if not self._timer.cancelled() and self._loop.time() < self._timer.when() <= due:
                return  # it comes early, looks again, and costs less than setting it anew after each message
            self._timer.cancel()
        self._timer = self._loop.call_at(due, self._tick)

    def _tick(self) -> None:
        self._timer = None
        self.feed(events.Tick())

    def _perform(self, effect: events.Effect) -> None:  # noqa: PLR0912  one line an effect
        match effect:
            case events.ToParent(message):
                if self._up is not None:
                    self._up.send(codec.encode(message, version=self._up_version))
            case events.ToChild(rank, message):
                if isinstance(message, Attached):
                    self._versions[rank] = message.version
                elif isinstance(message, Deliver) and message.manner is Manner.WORK:
                    self._bulk.give_way()
                if not self._down.send(rank, codec.encode(message, version=self._version_of(rank))):
                    self._queue.append(events.ChildLost(rank, "connection closed"))
            case events.Start(id_, body, ttl):
                if isinstance(body, Push) and body.stream.inline is None:
                    self._bulk.join(id_, body.stream)
                elif isinstance(body, Run):
                    self._bulk.give_way()
                self.worker.start(id_, body, ttl)
            case events.Connect(member):
                self._connect(member)
            case events.Disconnect():
                self._disconnect()
            case events.DropChild(rank, why):
                log.warning("rank %d is cut off: %s", rank, why)
                self._down.drop(rank, penalty=True)
                self._bulk.drop(rank)
            case events.Admit(keys):
                self._keyring.admit(dict(keys))
                self._background.admit(dict(keys))
            case events.Stop(id_, hard):
                self.worker.stop(id_, hard=hard)
            case events.Type(feed):
                self.worker.type(feed)
            case events.Granted(id_, grant):
                self.worker.granted(id_, grant)
            case events.Pour(id_, offset, data, last):
                self.worker.pour(id_, offset, data, last=last)
            case events.Keep():
                self.worker.keep(effect)
            case events.Load(id_, signature):
                self.worker.load(id_, signature)
            case events.Forget(ids):
                self.worker.forget(ids)
            case events.SavePlan(delivery):
                self.worker.save_plan(delivery)
            case events.Depart(leave):
                self.worker.depart(leave)
            case events.Arrived():
                self._complaints.clear()
                log.info("attached to %s", self._parent.name if self._parent is not None else "nobody")
                self.worker.arrived()
            case events.Warn(text):
                log.warning("%s", text)
            case _:
                self.worker.tell(effect)

    # --- control links ------------------------------------------------------------------------------------------------

    def _version_of(self, rank: int) -> int:
        """The version that was agreed on with a child."""
        return self._versions.get(rank, VERSION_MAX)

    def _connect(self, member: Member) -> None:
        self._disconnect()
        self._parent, self._up_version = member, VERSION_MAX
        self._up = Uplink(
            self._keyring,
            member.address,
            member.control_port,
            member.key,
            heard=self._from_parent,
            lost=self._parent_lost,
        )

    def _parent_lost(self, why: str) -> None:
        self._complain(why)
        self.feed(events.ParentLost(why))

    def _complain(self, why: str) -> None:
        """Log why there is no way up, once for as long as nothing else is the matter: the agent tries for ever."""
        if self._parent is not None:
            text = f"{self._parent.name} ({self._parent.address}:{self._parent.control_port}): {why}"
            if text not in self._complaints:
                self._complaints.add(text)
                log.warning("%s", text)

    def _disconnect(self) -> None:
        if self._up is not None:
            self._up.close()
        self._up = self._parent = None

    def _from_parent(self, frames: list[Blob]) -> None:
        try:
            message, _ = codec.decode(frames)
            if type(message) not in DOWNWARDS:
                raise MalformedMessage(f"a parent does not send {type(message).__name__}")
        except MalformedMessage as error:
            self._parent_lost(f"it sent a malformed message: {error}")
            return
        if isinstance(message, Rejected):
            self._complain(f"rejected: {message.why}")
        if isinstance(message, Attached) and VERSION_MIN <= message.version <= VERSION_MAX:
            self._up_version = message.version
        self.feed(events.FromParent(message))

    def _from_child(self, rank: int, frames: list[bytes]) -> None:
        message = self._decoded(rank, frames, UPWARDS)
        if message is not None:
            self.feed(events.FromChild(rank, message))

    def _decoded(self, rank: int, frames: list[bytes], allowed: frozenset[type[Message]]) -> Message | None:
        """A child's message; None where it is malformed or goes the wrong way, which costs the child its connection."""
        try:
            message, _ = codec.decode(frames)
            if type(message) not in allowed:
                raise MalformedMessage(f"a child does not send {type(message).__name__} there")
        except MalformedMessage as error:
            self._expel(rank, f"it sent a malformed message: {error}")
            return None
        return message

    def _expel(self, rank: int, why: str) -> None:
        self._perform(events.DropChild(rank, why))
        self.feed(events.ChildLost(rank, why))

    def _child_lost(self, rank: int, why: str) -> None:
        self.feed(events.ChildLost(rank, why))

    def _left(self, id_: int, source: int, why: str) -> None:
        self.feed(events.LeftSource(id_, source, why))

    # --- pushes -------------------------------------------------------------------------------------------------------

    def begin_transfer(self, id_: int, stream: Stream, role: Role, have: int = 0) -> None:
        """This host takes part in a push. `have` (bit i: chunk i) is what its own copy has already."""
        self._bulk.begin(id_, stream, role, have)

    def end_transfer(self, id_: int) -> None:
        """This host no longer does."""
        self._bulk.end(id_)

    def demote_transfer(self, id_: int) -> None:
        """This host can't keep what is pushed, and gives it on all the same."""
        self._bulk.demote(id_)

    def was_read(self, id_: int, read: Sequence[tuple[int, bytes | None, bytes | None]]) -> None:
        """The worker read chunks, or could not. See Bulk."""
        self._bulk.was_read(id_, read)

    def was_headed(self, id_: int, have: int) -> None:
        """The worker looked at a stream's head: the chunks in `have` (bit i: chunk i) are here already."""
        self._bulk.was_headed(id_, have)

    def was_stored(self, id_: int, indices: list[int]) -> int | None:
        """The worker stored chunks; how many bytes are on disk now, None where the push is over here."""
        return self._bulk.was_stored(id_, indices)

    # --- pulls --------------------------------------------------------------------------------------------------------

    def dial_root(self, port: int, *, heard: Callable[[list[Blob]], None], lost: Callable[[str], None]) -> Uplink:
        """A link of its own to the root, which listens at `port` for it: every host may reach the root, its last
        ancestor. See Uplink."""
        root = self.relay.root
        return Uplink(self._keyring, root.address, port, root.key, heard=heard, lost=lost)

    def listen(
        self, address: str, port: int, *, heard: Callable[[int, list[bytes]], None], lost: Callable[[int, str], None]
    ) -> Downlink:
        """The root: be there for such links. See Downlink."""
        return Downlink(self._keyring, "canopy-bulk", address, port, heard=heard, lost=lost)

    # --- moves of VMs -------------------------------------------------------------------------------------------------

    def dial(self, host: Hop, *, heard: Callable[[list[Blob]], None], lost: Callable[[str], None]) -> Uplink:
        """A link of its own to another host, which listens at `host.bulk_port` for it. See Uplink."""
        return Uplink(self._background, host.address, host.bulk_port, host.key, heard=heard, lost=lost)

    def await_host(
        self, id_: int, host: Hop, port: int, *, heard: Callable[[list[bytes]], None], lost: Callable[[str], None]
    ) -> Downlink:
        """Listen at `port` for another host, and hear nobody else there, until `dismiss_host`. Raises OSError."""
        self._background.admit_order(id_, {host.key: host.rank})

        def from_it(rank: int, frames: list[bytes]) -> None:
            if rank == host.rank:
                heard(frames)
            else:
                link.drop(rank, penalty=False)

        def it_is_lost(rank: int, why: str) -> None:
            if rank == host.rank:
                lost(why)

        link = Downlink(self._background, BULK, self._address, port, heard=from_it, lost=it_is_lost)
        return link

    def dismiss_host(self, id_: int) -> None:
        """The host is let in there no more."""
        self._background.dismiss_order(id_)

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Close all sockets; what is queued for the parent gets a moment to go, and what must be kept is written. What
        happens afterwards is nobody's business any more."""
        self._closed = True
        for effect in self.relay.close():
            self._perform(effect)
        if self._timer is not None:
            self._timer.cancel()
        if self._up is not None:
            self._up.close(_LINGER_MS)
        self._down.close()
        self._bulk.close()
        self._background.close()
        self._keyring.close()
