"""What runs on the service node: the Python API (`Session` and `AsyncSession`), the `ctl` command over it, the service
and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.async_session import AsyncSession
    from controller.session import Session

__all__ = ["AsyncSession", "Session"]


def __getattr__(name: str) -> Any:
    # Each is loaded when it is asked for: ctl needs no asyncio.
    if name == "Session":
        from controller.session import Session

        return Session
    if name == "AsyncSession":
        from controller.async_session import AsyncSession

        return AsyncSession
    raise AttributeError(name)
