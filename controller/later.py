"""Modules that are read when something of them is first asked for: a quick command pays for what it uses."""

from __future__ import annotations

from typing import Any


class Later:
    """Stands for a module until then. To type checkers it is the module: see `session`."""

    def __init__(self, name: str) -> None:
        self._name = name

    def __getattr__(self, attribute: str) -> Any:
        from importlib import import_module

        found = getattr(import_module(self._name), attribute)
        setattr(self, attribute, found)  # the next time it is found without coming here
        return found
