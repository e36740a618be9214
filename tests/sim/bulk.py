"""Pushes in the made-up tree: `protocol.transfer` at each host, direct links between them, and made-up disks.

Faults and slow links are the business of `tests.sim.chain`; here it is seen how a push goes with its command.
"""

from __future__ import annotations

import msgspec

from protocol import events, ranks
from protocol import transfer_effects as transfer
from protocol.commands import Push
from protocol.limits import MAX_INLINE
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart
from protocol.stream import Blob, stream_of
from protocol.transfer import Role, Transfers
from protocol.transfer_effects import Effect
from tests.sim.chain import order_of
from tests.sim.tree import Node, Tree

#: A disk's time for one chunk, and that of a message from host to host, in seconds.
_DISK = 0.001
_WAY = 0.001


class Bulk:
    """The bulk links of a tree."""

    def __init__(self, tree: Tree) -> None:
        self._tree = tree
        tree.bulk = self
        self._transfers: dict[tuple[int | None, int], Transfers] = {}
        #: What the root pushes, and in chunks of how many bytes.
        self._files: dict[int, tuple[bytes, int]] = {}
        #: What each host has on disk: by rank and push, chunk by chunk.
        self.stored: dict[tuple[int | None, int], dict[int, bytes]] = {}

    def push(self, data: bytes, chunk: int, targets: list[int]) -> int:
        """The root pushes a file in chunks of so many bytes; returns the command's id."""
        assert chunk * 2 <= MAX_INLINE, "made-up files are small"
        stream = stream_of(lambda at: data[at * chunk :][:chunk], len(data), chunk=chunk)
        order = tuple(hop for hop in order_of(max(targets) + 1) if hop.rank in targets)
        stream = msgspec.structs.replace(stream, inline=None, order=order)
        body = Push(folder="/", stream=stream)
        id_ = self._tree.next_id
        self._files[id_] = data, chunk
        root = self._tree.nodes[None]
        self._perform(None, self._of(root).begin(id_, stream, Role.SOURCE, 0, self._tree.now))
        assert self._tree.submit(body, ranks.union(targets)) == id_
        return id_

    def begin(self, node: Node, id_: int, push: Push) -> None:
        """A target begins."""
        self._perform(node.rank, self._of(node).begin(id_, push.stream, Role.TARGET, 0, self._tree.now))

    def perform(self, node: Node, effect: events.Forget) -> None:
        """What a relay wants done that concerns chunks."""
        for id_ in effect.ids:
            self._of(node).end(id_)

    def _of(self, node: Node) -> Transfers:
        return self._transfers.setdefault((node.rank, node.life), Transfers(node.rank))

    def _perform(self, rank: int | None, effects: list[Effect]) -> None:
        node = self._tree.nodes[rank]
        for effect in effects:
            match effect:
                case transfer.AskOf(source, id_, indices):
                    whom = "the root" if source is None else f"h{source}"
                    assert rank is not None
                    if indices:
                        named = ", ".join(map(str, indices))
                        self._tree.say(rank, f"asks {whom} for chunk {named} of push {id_}")
                    self._send(source, "asked", rank, id_, indices)
                case transfer.Give(peer, id_, index, blob):
                    self._tree.say(rank, f"gives chunk {index} of push {id_} to h{peer}")
                    self._send(peer, "arrived", rank, id_, index, blob)
                case transfer.Decline(peer, id_, index, why, final):
                    self._tree.say(rank, f"declines chunk {index} of push {id_} to h{peer}: {why}")
                    self._send(peer, "declined", rank, id_, index, why, final=final)
                case transfer.Hold(peer, id_, front):
                    self._send(peer, "held", rank, id_, front)
                case transfer.Read(id_, index):
                    self._read(node, id_, index)
                case transfer.Store(id_, index, blob):
                    self._store(node, id_, index, blob)
                case transfer.Headed(id_):
                    self._perform(rank, self._of(node).was_headed(id_, 0, self._tree.now))
                case transfer.Complete(id_):
                    self._tree.say(rank, f"has all of push {id_}, and puts the file in its place")
                    self._tree.finish_later(node, id_, _DISK, Exited(0), NO_OUTPUT)
                case transfer.Broken(id_, why, _):
                    self._tree.finish_later(node, id_, _DISK, FailedToStart(why), NO_OUTPUT)
                case transfer.Bypassed() | transfer.Abuse():
                    raise AssertionError(f"{rank}: {effect}")
        self._tick_later(node)

    def _send(self, rank: int | None, act: str, *arguments: object, **more: object) -> None:
        def arrive() -> None:
            node = self._tree.nodes[rank]
            if node.alive:
                self._perform(rank, getattr(self._of(node), act)(*arguments, self._tree.now, **more))

        self._tree.at(self._tree.now + _WAY, arrive)

    def _read(self, node: Node, id_: int, index: int) -> None:
        def read() -> None:
            if node.rank is None:
                data, chunk = self._files[id_]
                blob: bytes | None = data[index * chunk :][:chunk]
            else:
                blob = self.stored[node.rank, id_].get(index)
            self._perform(node.rank, self._of(node).was_read(id_, [(index, blob, None)], self._tree.now))

        self._tree.at(self._tree.now + _DISK, read)

    def _store(self, node: Node, id_: int, index: int, blob: Blob) -> None:
        def store() -> None:
            self.stored.setdefault((node.rank, id_), {})[index] = bytes(blob)
            self._perform(node.rank, self._of(node).was_stored(id_, [index], self._tree.now))

        self._tree.at(self._tree.now + _DISK, store)

    def _tick_later(self, node: Node) -> None:
        due = self._of(node).wakeup()
        if due is None:
            return

        def tick() -> None:
            if self._tree.nodes[node.rank] is node and node.alive:
                self._perform(node.rank, self._of(node).advance(self._tree.now))

        self._tree.at(max(due, self._tree.now), tick)
