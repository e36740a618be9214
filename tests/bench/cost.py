"""What a broadcast costs, by who pays for it: CPU time of each kind of thread, and the most memory that was taken."""

from __future__ import annotations

import os
import threading
from collections import defaultdict
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import psutil

#: How often the memory of processes that come and go is looked at, in seconds.
_SAMPLE_S = 0.02
_TICKS = os.sysconf("SC_CLK_TCK")


def cpu_by_thread(pids: Iterable[int]) -> dict[str, float]:
    """CPU seconds so far of these processes: by the name of the thread (`/proc/PID/task/TID/schedstat`, whose first
    number is nanoseconds on a core), and as `commands` those of children that have ended (proc_pid_stat(5), cutime and
    cstime)."""
    found: dict[str, float] = defaultdict(float)
    for pid in pids:
        with suppress(OSError):
            for thread in Path(f"/proc/{pid}/task").iterdir():
                kind = "zeromq" if (thread / "comm").read_text().startswith("ZMQ") else "python"
                found[kind] += int((thread / "schedstat").read_text().split()[0]) / 1e9
            fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
            found["commands"] += (int(fields[13]) + int(fields[14])) / _TICKS
    return found


class Peaks:
    """The largest resident set of each of these processes while it is entered, in MiB: the kernel's own high-water mark
    (proc_pid_status(5), VmHWM), which writing 5 to clear_refs sets back (proc_pid_clear_refs(5))."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._pids = list(pids)
        self.most: dict[int, float] = {}

    def __enter__(self) -> Peaks:
        for pid in self._pids:
            Path(f"/proc/{pid}/clear_refs").write_text("5")
        return self

    def __exit__(self, *_: object) -> None:
        for pid in self._pids:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            self.most[pid] = next(int(line.split()[1]) for line in lines if line.startswith("VmHWM:")) / 1024


class TreeMemory:
    """The most memory that those took together whom this process starts while it is entered, with their descendants, in
    MiB: what they share counts for each of them, and who lives shorter than _SAMPLE_S is perhaps not seen."""

    def __init__(self) -> None:
        self.most = 0.0
        self._own = psutil.Process()
        self._before = set(self._own.children())
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def _watch(self) -> None:
        while not self._over.wait(_SAMPLE_S):
            total = 0
            for started in set(self._own.children()) - self._before:
                with suppress(psutil.Error):
                    total += sum(process.memory_info().rss for process in (started, *started.children(recursive=True)))
            self.most = max(self.most, total / 2**20)

    def __enter__(self) -> TreeMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()
