"""Who works on which VM: one at a time for a name and for a UUID, in the order in which they came."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator


class Locks:
    """A lock for each key that somebody works on."""

    def __init__(self) -> None:
        self._locks: dict[str, tuple[asyncio.Lock, list[None]]] = {}

    def __contains__(self, key: str) -> bool:
        """Whether somebody works on it, or waits to."""
        return key in self._locks

    @contextlib.asynccontextmanager
    async def alone(self, *keys: str) -> AsyncIterator[None]:
        """Nobody else works on any of `keys`. libvirt can crash on two creations of one name or UUID at a time."""
        async with contextlib.AsyncExitStack() as stack:
            for key in sorted(keys):
                lock, users = self._locks.setdefault(key, (asyncio.Lock(), []))
                users.append(None)
                stack.callback(self._leave, key)
                await stack.enter_async_context(lock)
            yield

    def _leave(self, key: str) -> None:
        _, users = self._locks[key]
        users.pop()
        if not users:
            del self._locks[key]


def name_key(name: str) -> str:
    """The key of a VM's name."""
    return f"name {name}"


def uuid_key(uuid: str) -> str:
    """The key of a VM's UUID."""
    return f"uuid {uuid}"
