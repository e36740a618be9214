"""Imported first of all by `ctl`: keeps out what a quick command would load for nothing.

msgspec takes typing_extensions where there is any and does without where there is none. It is there for others, and
brings inspect, ast, dis and tokenize with it: 6 ms of the 40 that a command's whole start takes.
"""

from __future__ import annotations

import sys

_NAME = "typing_extensions"

if "msgspec" not in sys.modules and _NAME not in sys.modules:
    # None makes `import typing_extensions` an ImportError (The Python Language Reference, 5.3.1: the module cache).
    sys.modules[_NAME] = None  # type: ignore[assignment]  # typeshed knows modules alone
    import msgspec  # noqa: F401  reads it now, and never again

    del sys.modules[_NAME]
