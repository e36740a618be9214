"""What runs on the service node: the Python API (`Session`), the `ctl` command over it, the service and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:
    if name == "Session":
        from controller.session import Session

        return Session
    raise AttributeError(name)
