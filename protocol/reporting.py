"""What goes up without haste: hosts' reports and the progress of pushes wait for each other, merged by rank."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import TypeAlias

from protocol.limits import FOLD_BYTES, MAX_LEFT, REPORT_WINDOW
from protocol.messages import Progress, Report, Reports, newest

#: Who left whom in a push's order, and why.
Left: TypeAlias = tuple[int, int, str]

#: What one VM and one host cost in a report besides names: generously.
_OVERHEAD = 300


class Reporting:
    """What waits to go up. `due` (seconds, monotonic) is when it does, None where nothing waits."""

    def __init__(self) -> None:
        self._reports: dict[int, Report] = {}
        self._progress: dict[int, dict[int, int]] = {}
        self._left: dict[int, list[Left]] = {}
        self.due: float | None = None

    def add_reports(self, reports: Iterable[Report], now: float) -> None:
        """Hosts said something of themselves."""
        for report in reports:
            waiting = self._reports.get(report.rank)
            self._reports[report.rank] = report if waiting is None else newest(waiting, report)
        if self.due is None:
            self.due = now + REPORT_WINDOW

    def add_progress(self, id_: int, done: Iterable[tuple[int, int]], left: Iterable[Left], now: float) -> None:
        """Hosts have so many bytes of push `id_`, and left others in its order."""
        self._progress.setdefault(id_, {}).update(done)
        waiting = self._left.setdefault(id_, [])
        before = len(waiting)
        waiting.extend(left)
        if len(waiting) > before:
            self.due = now  # the push may be over in a moment, and then nobody hears it any more
        if self.due is None:
            self.due = now + REPORT_WINDOW

    def way_up(self, now: float) -> None:
        """There is a way up (again): what waits leaves at once."""
        if self._reports or self._progress:
            self.due = now

    def rest(self, now: float) -> None:
        """There is no way up: what is due stays, and is due when there is one."""
        if self.due is not None and now >= self.due:
            self.due = None

    def ready(self, now: float) -> Iterator[Progress | Reports]:
        """The messages that are due; what they hold is forgotten here."""
        if self.due is None or now < self.due:
            return
        self.due = None
        progress, self._progress = self._progress, {}
        all_left, self._left = self._left, {}
        for id_ in sorted(progress):
            left = all_left[id_]
            yield Progress(id_, tuple(sorted(progress[id_].items())), tuple(left[:MAX_LEFT]))
            for at in range(MAX_LEFT, len(left), MAX_LEFT):
                yield Progress(id_, (), tuple(left[at : at + MAX_LEFT]))
        reports, self._reports = self._reports, {}
        yield from _batches(reports[rank] for rank in sorted(reports))


def _batches(reports: Iterable[Report]) -> Iterator[Reports]:
    """The reports in messages of a size that every relay takes."""
    batch: list[Report] = []
    size = 0
    for report in reports:
        batch.append(report)
        size += _OVERHEAD + (4 * len(report.host.note) if report.host is not None else 0)
        for vm in report.vms:
            size += _OVERHEAD + len(vm.name) + len(vm.deployment) + len(vm.reason)
        if size >= FOLD_BYTES:
            yield Reports(tuple(batch))
            batch, size = [], 0
    if batch:
        yield Reports(tuple(batch))
