"""What a host's administrator may set: `agent.conf` in the agent's directory, read again whenever it matters.

Lines of `name = value`, empty ones, and comments after `#`:

    spool_total = 512M    # what output beyond commands' budgets may take here; k, M and G are powers of 1,024
    spool_days = 2        # how long it is kept
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple

_SIZE = re.compile("([0-9]{1,12})([kKmMgG]?)")
_DAYS = re.compile(r"[0-9]{1,5}(?:\.[0-9]{1,6})?")
_SHIFTS = {"": 0, "k": 10, "m": 20, "g": 30}


class Settings(NamedTuple):
    """The defaults: four commands that wrote as much as one may keep here, and as long as outcomes are kept."""

    spool_total: int = 1 << 30
    spool_days: float = 7.0


def parse(text: str) -> tuple[Settings, list[str]]:
    """The settings, and a sentence for each line that is none; what that was to set stays at its default."""
    settings, wrong = Settings(), []
    for number, line in enumerate(text.splitlines(), 1):
        name, _, value = (part.strip() for part in line.partition("#")[0].partition("="))
        size, days = _SIZE.fullmatch(value), _DAYS.fullmatch(value)
        if name == "spool_total" and size is not None:
            settings = settings._replace(spool_total=int(size[1]) << _SHIFTS[size[2].lower()])
        elif name == "spool_days" and days is not None:
            settings = settings._replace(spool_days=float(value))
        elif name == "spool_total":
            wrong.append(f"line {number}: {name} is a size like 512M")
        elif name == "spool_days":
            wrong.append(f"line {number}: {name} is a number of days")
        elif name or value:
            wrong.append(f"line {number}: there is no setting {name[:40]!r}; there are {', '.join(Settings._fields)}")
    return settings, wrong


def read(path: Path) -> tuple[Settings, list[str]]:
    """What the file says; the defaults where there is none. Another trouble with it is told like a wrong line."""
    try:
        return parse(path.read_text())
    except FileNotFoundError:
        return Settings(), []
    except (OSError, UnicodeDecodeError) as error:
        return Settings(), [str(error)]
