"""Imported first of all by `ctl`: keeps out what a quick command would load for nothing.

For types and formats of which nothing here has any, msgspec loads what makes up a fifth of a command's whole start:
uuid (and with it platform), decimal, JSON Schema, TOML and YAML, the Python half of datetime, and typing_extensions
where there is one, which brings inspect, ast, dis and tokenize. They are kept from it while it is read; whoever imports
one of them afterwards gets it as it is. To msgspec, in `ctl`, a UUID or a Decimal is an object like any other.
"""

from __future__ import annotations

import gc
import sys
from types import ModuleType, SimpleNamespace

#: What msgspec asks of the modules that are kept from it.
_STANDING_IN: dict[str, dict[str, object]] = {
    "uuid": {"UUID": type("UUID", (), {}), "SafeUUID": SimpleNamespace(unknown=None)},
    "decimal": {"Decimal": type("Decimal", (), {})},
    "msgspec._json_schema": {"schema": None, "schema_components": None},
    "msgspec.inspect": {},
    "msgspec.toml": {},
    "msgspec.yaml": {},
}


def _read_msgspec() -> None:
    import _datetime  # type: ignore[import-not-found]  # datetime is this and a version of it in Python, which gives way to this one

    modules: dict[str, ModuleType | None] = {"datetime": _datetime}
    for name, attributes in _STANDING_IN.items():
        module = modules[name] = ModuleType(name)
        vars(module).update(attributes)
    # None makes an import an ImportError (The Python Language Reference, 5.3.1: the module cache).
    modules["typing_extensions"] = None
    for name in modules.keys() & sys.modules.keys():
        del modules[name]
    sys.modules.update(modules)  # type: ignore[arg-type]  # typeshed knows modules alone
    try:
        import msgspec
    except (AttributeError, ImportError):  # another version may ask for more: then it gets all
        for name in [name for name in sys.modules if name.partition(".")[0] == "msgspec"]:
            del sys.modules[name]
        return
    finally:
        for name in modules:
            sys.modules.pop(name, None)
    for name in modules:
        package, _, rest = name.rpartition(".")
        if package:
            vars(msgspec).pop(rest, None)


def read() -> None:
    """All is imported that a quick command takes."""
    if not gc.isenabled():
        gc.freeze()
        gc.enable()


if "msgspec" not in sys.modules:
    # What is made by imports stays until the end: to look through it again and again finds no garbage.
    gc.disable()
    _read_msgspec()
