"""The rolling upgrade of `ctl up`: hosts that run an older version are replaced in waves, leaves first.

A wave goes on only where all of the one before came back. A host that did not is put back on the version that it had.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

import msgspec

from controller import api
from controller.bootstrap import Enroller, HostResult, Options, Progress, Target, bootstrap
from controller.session import Session
from controller.status import CtlError, ExitStatus

_PERCENT = re.compile(r"([0-9]{1,3}(?:\.[0-9]{1,6})?)%")
_NUMBER = re.compile(r"[0-9]{1,9}")


@dataclass(frozen=True, kw_only=True)
class Upgrade:
    """What came of it: hosts on the new version, hosts that stayed in the tree on the old one with the reason for each,
    and hosts that are in the tree no more. `stopped` says why not all waves were begun, empty where they were."""

    new: tuple[str, ...] = ()
    old: dict[str, str] = field(default_factory=dict)
    gone: dict[str, str] = field(default_factory=dict)
    stopped: str = ""


def wave_size(wave: str, total: int) -> int:
    """How many of `total` hosts are replaced at a time: a percentage (rounded down) or a number, one at least.

    Raises CtlError (USAGE).
    """
    percent = _PERCENT.fullmatch(wave)
    if percent is not None and 0 < Fraction(percent[1]) <= 100:
        return max(1, int(Fraction(percent[1]) / 100 * total))
    if _NUMBER.fullmatch(wave) and int(wave) > 0:
        return int(wave)
    raise CtlError(f"--wave {wave}: give a percentage like 10%, or a number above 0", ExitStatus.USAGE)


def waves(hosts: Iterable[api.HostStatus], outdated: Iterable[str], size: int) -> list[tuple[str, ...]]:
    """Who is replaced together, `size` at most: leaves first, and nobody with one above or below himself."""
    planned = {host.name: host.planned_parent for host in hosts}
    height = dict.fromkeys(planned, 0)
    for above in planned.values():
        at, parent = 0, above
        while parent is not None and parent in height and at <= len(planned):
            at += 1
            height[parent] = max(height[parent], at)
            parent = planned[parent]
    levels: dict[int, list[str]] = {}
    for name in outdated:
        levels.setdefault(height[name], []).append(name)
    order = {name: place for place, name in enumerate(planned)}
    found = []
    for _, level in sorted(levels.items()):
        level.sort(key=order.__getitem__)
        found += [tuple(level[first : first + size]) for first in range(0, len(level), size)]
    return found


class Upgrader:
    """Replaces agents in waves."""

    def __init__(
        self,
        session: Session,
        settings: Options,
        enroller: Enroller,
        within: Callable[[int], float],
        progress: Callable[[Progress], None],
    ) -> None:
        """`within(n)` is what n started agents may take to their places in the tree, in seconds."""
        self._session = session
        self._settings = settings
        self._enroller = enroller
        self._within = within
        self._progress = progress

    def run(self, plan: Sequence[Sequence[str]]) -> Upgrade:
        """Replace the agents of these waves. Raises SshError, CtlError."""
        new: list[str] = []
        old: dict[str, str] = {}
        gone: dict[str, str] = {}
        for number, wave in enumerate(plan):
            before = self._hosts()
            reasons, went_back = self._replace(wave, before, settled=len(new) + len(old))
            new += [name for name in wave if name not in reasons]
            if not reasons:
                continue
            after = self._hosts()
            # Whom SSH did not reach runs what it ran.
            harmed = [name for name in reasons if name in went_back or _changed(before[name], after[name])]
            old |= {name: why for name, why in reasons.items() if name not in harmed and after[name].up}
            gone |= {name: why for name, why in reasons.items() if name not in harmed and not after[name].up}
            if not harmed:
                continue
            lost = self._put_back(harmed, went_back, before, after)
            rest = [name for later in plan[number + 1 :] for name in later]
            for name in harmed:
                if name not in lost:
                    old[name] = (
                        reasons[name] if name in went_back else f"{reasons[name]}; the previous version runs again"
                    )
            gone |= {name: f"{reasons[name]}; {why}" for name, why in lost.items()}
            old |= dict.fromkeys(rest, "not tried after that")
            return Upgrade(new=tuple(new), old=old, gone=gone, stopped=_stopped(harmed, reasons))
        return Upgrade(new=tuple(new), old=old, gone=gone)

    def _hosts(self) -> dict[str, api.HostStatus]:
        return {host.name: host for host in self._session.status().hosts}

    def _bootstrap(self, names: Sequence[str], settings: Options, settled: int) -> list[HostResult]:
        def progress(now: Progress) -> None:
            self._progress(msgspec.structs.replace(now, started=now.started + settled))

        return asyncio.run(bootstrap([Target(name=name) for name in names], settings, self._enroller, progress))

    def _replace(
        self, wave: Sequence[str], before: Mapping[str, api.HostStatus], *, settled: int
    ) -> tuple[dict[str, str], set[str]]:
        """Replace the agents of one wave. Why some are not in the tree anew, and which have gone back by themselves."""
        results = self._bootstrap(wave, self._settings, settled)
        reasons = {result.name: result.reason for result in results if result.state == "failed"}
        went_back = {result.name for result in results if result.went_back}
        started = [result.name for result in results if result.state == "started"]
        missing = self._session.wait_for(
            [result.name for result in results if result.state != "failed"],
            self._within(len(wave)),
            newer_than={name: before[name].incarnation or 0 for name in started},
        )
        reasons |= {name: f"its new agent did not come into the tree: {why}" for name, why in missing.items()}
        return reasons, went_back

    def _put_back(
        self,
        harmed: Sequence[str],
        went_back: set[str],
        before: Mapping[str, api.HostStatus],
        after: Mapping[str, api.HostStatus],
    ) -> dict[str, str]:
        """Have hosts run the version that they had. Those that are not in the tree then, and why."""
        by_version: dict[str, list[str]] = {}
        for name in harmed:
            if name not in went_back:
                by_version.setdefault(before[name].digest, []).append(name)
        failed: dict[str, str] = {}
        for digest, names in sorted(by_version.items()):
            settings = msgspec.structs.replace(self._settings, flat=True, bundle=digest)
            results = self._bootstrap(names, settings, 0)
            failed |= {result.name: result.reason for result in results if result.state == "failed"}
        back = [name for name in harmed if name not in failed]
        # Who has gone back by himself may have attached before `after` was asked for.
        since = {name: (before if name in went_back else after)[name].incarnation or 0 for name in back}
        missing = self._session.wait_for(back, self._within(len(back)), newer_than=since) if back else {}
        told = {name: f"the previous version can't be put back: {why}" for name, why in failed.items()}
        return told | {
            name: f"the previous version was put back, and is not there: {why}" for name, why in missing.items()
        }


def _changed(before: api.HostStatus, after: api.HostStatus) -> bool:
    return before.up and (not after.up or after.incarnation != before.incarnation)


def _stopped(harmed: Sequence[str], reasons: Mapping[str, str]) -> str:
    first = harmed[0]
    more = f" (and {len(harmed) - 1} more)" if len(harmed) > 1 else ""
    return f"{first}{more} did not come back on the new version: {reasons[first]}"
