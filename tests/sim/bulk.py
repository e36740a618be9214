"""Pushes in the made-up tree: `protocol.transfer` at each host, chunks over a link of their own, and made-up disks."""

from __future__ import annotations

import msgspec

from protocol import events, ranks, transfer
from protocol.commands import Push
from protocol.limits import MAX_INLINE
from protocol.outcomes import NO_OUTPUT, Exited, FailedToStart
from protocol.stream import stream_of
from protocol.transfer import Role, Transfers
from tests.sim.tree import Node, Tree

#: A disk's time for one chunk, in seconds.
_DISK = 0.001


class Bulk:
    """The bulk links of a tree. Each host asks the parent that it is attached to."""

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
        body = Push(folder="/", stream=msgspec.structs.replace(stream, inline=None))
        id_ = self._tree.next_id
        self._files[id_] = data, chunk
        self._perform(None, self._of(self._tree.nodes[None]).begin(id_, body.stream, Role.SOURCE))
        assert self._tree.submit(body, ranks.union(targets)) == id_
        return id_

    def begin(self, node: Node, id_: int, push: Push) -> None:
        """A target begins."""
        self._perform(node.rank, self._of(node).begin(id_, push.stream, Role.TARGET))

    def perform(self, node: Node, effect: events.Arrived | events.Carry | events.Forget) -> None:
        """What a relay wants done that concerns chunks."""
        match effect:
            case events.Arrived():
                self._of(node).source_changed(self._tree.now)
                self._tick_later(node)
            case events.Carry(id_, push):
                self._perform(node.rank, self._of(node).begin(id_, push.stream, Role.CARRIER))
            case events.Forget(ids):
                for id_ in ids:
                    self._of(node).end(id_)

    def _of(self, node: Node) -> Transfers:
        return self._transfers.setdefault((node.rank, node.life), Transfers())

    def _perform(self, rank: int | None, effects: list[transfer.Effect]) -> None:
        node = self._tree.nodes[rank]
        for effect in effects:
            match effect:
                case transfer.AskUp(id_, indices):
                    self._tree.say(rank, f"asks its parent for chunk {', '.join(map(str, indices))} of push {id_}")
                    self._ask(node, id_, indices)
                case transfer.Give(child, id_, index, blob):
                    self._tree.say(rank, f"gives chunk {index} of push {id_} to h{child}")
                    self._give(child, id_, index, blob)
                case transfer.Decline(child, id_, index, why, final):
                    self._tree.say(rank, f"declines chunk {index} of push {id_} to h{child}: {why}")
                    self._decline(child, id_, index, why, final=final)
                case transfer.Read(id_, index):
                    self._read(node, id_, index)
                case transfer.Store(id_, index, blob):
                    self._store(node, id_, index, blob)
                case transfer.Headed(id_):
                    self._perform(rank, self._of(node).was_headed(id_, 0))
                case transfer.Complete(id_):
                    self._tree.say(rank, f"has all of push {id_}, and puts the file in its place")
                    self._tree.finish_later(node, id_, _DISK, Exited(0), NO_OUTPUT)
                case transfer.Broken(id_, why):
                    self._tree.finish_later(node, id_, _DISK, FailedToStart(why), NO_OUTPUT)
                case transfer.Abuse(child, why):
                    raise AssertionError(f"h{child}: {why}")
        self._tick_later(node)

    def _ask(self, node: Node, id_: int, indices: tuple[int, ...]) -> None:
        connection = node.up
        if connection is None:
            return

        def arrive() -> None:
            parent = self._tree.nodes[connection.parent]
            if connection.open and parent.alive:
                self._perform(parent.rank, self._of(parent).asked(connection.child, id_, indices))

        self._tree.network.travel(connection, True, arrive)

    def _down(self, child: int, act: str, *arguments: object) -> None:
        connection = self._tree.nodes[child].up
        if connection is None:
            return

        def arrive() -> None:
            node = self._tree.nodes[child]
            if connection.open and node.alive:
                self._perform(child, getattr(self._of(node), act)(*arguments, self._tree.now))

        self._tree.network.travel(connection, False, arrive)

    def _give(self, child: int, id_: int, index: int, blob: bytes) -> None:
        self._down(child, "arrived", id_, index, blob)

    def _decline(self, child: int, id_: int, index: int, why: str, *, final: bool) -> None:
        self._down(child, "declined", id_, index, why, final)

    def _read(self, node: Node, id_: int, index: int) -> None:
        def read() -> None:
            if node.rank is None:
                data, chunk = self._files[id_]
                blob: bytes | None = data[index * chunk :][:chunk]
            else:
                blob = self.stored[node.rank, id_].get(index)
            self._perform(node.rank, self._of(node).was_read(id_, index, blob))

        self._tree.at(self._tree.now + _DISK, read)

    def _store(self, node: Node, id_: int, index: int, blob: bytes) -> None:
        def store() -> None:
            self.stored.setdefault((node.rank, id_), {})[index] = blob
            self._perform(node.rank, self._of(node).was_stored(id_, index))

        self._tree.at(self._tree.now + _DISK, store)

    def _tick_later(self, node: Node) -> None:
        due = self._of(node).wakeup()
        if due is None:
            return

        def tick() -> None:
            if self._tree.nodes[node.rank] is node and node.alive:
                self._perform(node.rank, self._of(node).advance(self._tree.now))

        self._tree.at(max(due, self._tree.now), tick)
