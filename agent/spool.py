"""The spool: output beyond a command's budget, kept on its host until there is too much of it."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

#: What all spools of a host may take in bytes: four commands that wrote as much as one may.
SPOOLS_MOST = 1 << 30


def trim(folder: Path, most: int = SPOOLS_MOST) -> None:
    """Remove the oldest spools until the others have at most `most` bytes. Blocks."""
    found = []
    for entry in os.scandir(folder):
        with suppress(FileNotFoundError):
            info = entry.stat(follow_symlinks=False)
            found.append((info.st_mtime_ns, entry.path, info.st_size))
    total = sum(size for _, _, size in found)
    for _, path, size in sorted(found):
        if total <= most:
            return
        with suppress(FileNotFoundError):
            os.unlink(path)
        total -= size
