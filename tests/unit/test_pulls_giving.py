"""What a host gives in a pull: chunks as the root asks for them, packed where that pays."""

from __future__ import annotations

import asyncio
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from agent.packing import unpack
from agent.pulls import Pulls
from agent.source import gather
from protocol import codec
from protocol.commands import Send
from protocol.limits import CHUNK
from protocol.messages import Ask, Chunk, Have
from protocol.stream import Blob
from protocol.wishes import Wishes

OFFER, SEND = 3, 4


class Link:
    """What the host says to the root."""

    def __init__(self) -> None:
        self.said: list[tuple[Any, Blob | None]] = []
        self._more = asyncio.Event()

    def send(self, frames: Sequence[Blob]) -> None:
        self.said.append(codec.decode(frames))
        self._more.set()

    async def all_said(self, count: int) -> None:
        while len(self.said) < count:
            self._more.clear()
            await self._more.wait()

    def close(self) -> None: ...


class FakeShell:
    """Gives a host its link to the root."""

    def __init__(self) -> None:
        self.link = Link()
        self.heard: Callable[[list[Blob]], None]

    def dial_root(self, _port: int, *, heard: Callable[[list[Blob]], None], lost: object) -> Link:
        del lost
        self.heard = heard
        return self.link


@pytest.mark.parametrize("compress", [True, False])
def test_chunks_travel_packed_where_that_pays_and_is_allowed(tmp_path: Path, compress: bool) -> None:
    file = tmp_path / "file"
    file.write_bytes(b"one line after the other\n" * CHUNK + os.urandom(2 * CHUNK))

    async def play() -> list[tuple[Any, Blob | None]]:
        shell = FakeShell()
        pulls = Pulls(cast("Any", shell), cast("Any", None), lambda *_: None)
        source = gather([(b"file", str(file))], Wishes(compress=compress), tmp_path)
        pulls._keep(OFFER, source)
        pulls.send(SEND, Send(of=OFFER, port=1))
        count = -(-source.stream.size // CHUNK)
        for some in (range(20), range(20, count)):
            shell.heard(list(codec.encode(Ask(OFFER, tuple(some)))))
        await asyncio.wait_for(shell.link.all_said(count + 1), 30)
        await pulls.close()
        return shell.link.said

    have, *chunks = asyncio.run(play())
    assert isinstance(have[0], Have)
    packed = [chunk.packed for chunk, _ in chunks if isinstance(chunk, Chunk)]
    assert packed[0] is compress
    assert packed[-1] is False
    whole = {chunk.index: blob for chunk, blob in chunks}
    data = file.read_bytes()
    for chunk, _ in chunks:
        plain = data[chunk.index * CHUNK :][:CHUNK]
        blob = whole[chunk.index]
        assert blob is not None
        assert (unpack(blob, len(plain)) if chunk.packed else blob) == plain
