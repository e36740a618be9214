"""What runs on the service node: the Python API (`Session`), the `ctl` command over it, the service and its state."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from controller.session import Session

__all__ = ["Session"]


def __getattr__(name: str) -> Any:  # noqa: ANN401  loaded when it is asked for: `ctl --help` needs no socket
    if name == "Session":
        from controller.session import Session  # noqa: PLC0415

        return Session
    raise AttributeError(name)
