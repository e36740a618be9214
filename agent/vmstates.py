"""What is known of this host's VMs, and since when. Pure: sightings come in with their time, changes go out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from agent.domains import Domain
from protocol.vms import VmPower, VmState

# A VM in another state can't answer at its address.
_CAN_ANSWER = (VmPower.RUNNING, VmPower.BLOCKED, VmPower.UNKNOWN)


@dataclass(frozen=True)
class _Record:
    deployment: str
    power: VmPower
    reason: str
    since: float
    run: int
    reachable: bool | None = None
    #: What it was before nothing could be told, so that it is as old as before when it turns out the same.
    before: _Record | None = None


class StateTable:
    """The states of one agent's VMs by name. Times are seconds of one clock that never goes back.

    Every method that changes the table returns the states that are new, sorted by name.
    """

    def __init__(self) -> None:
        self._records: dict[str, _Record] = {}

    def saw(self, domains: Iterable[Domain], files: Mapping[str, str], now: float) -> list[VmState]:
        """All domains of this agent as they are now. `files`: the deployment of each VM that has files and no domain.

        Such a VM is gone; one with neither is forgotten, and said to be gone once.
        """
        new: dict[str, _Record] = {}
        for domain in domains:
            if domain.mark is not None:
                new[domain.name] = _Record(domain.mark.deployment, domain.power, domain.reason, now, domain.run)
        for name, deployment in files.items():
            if name not in new:
                new[name] = _Record(deployment, VmPower.GONE, "libvirt does not know it any more", now, -1)
        changed = [self._put(name, record, now) for name, record in new.items()]
        for name in self._records.keys() - new.keys():
            record = self._records.pop(name)
            changed.append(_state(name, replace(record, power=VmPower.GONE, reason="removed", since=now), now))
        return _sorted(changed)

    def lost_sight(self, why: str, files: Mapping[str, str], now: float) -> list[VmState]:
        """Nothing can be told of any VM, for the reason `why`. `files` as for `saw`."""
        changed = []
        for name in self._records.keys() | files.keys():
            old = self._records.get(name)
            deployment = files[name] if old is None else old.deployment
            before = old.before if old is not None and old.before is not None else old
            changed.append(self._put(name, _Record(deployment, VmPower.UNKNOWN, why, now, -1, before=before), now))
        return _sorted(changed)

    def answered(self, answers: Mapping[str, bool | None], now: float) -> list[VmState]:
        """Which VMs answered at their addresses."""
        changed = []
        for name, answer in answers.items():
            record = self._records.get(name)
            if record is not None and record.reachable != answer and record.power in _CAN_ANSWER:
                self._records[name] = replace(record, reachable=answer)
                changed.append(_state(name, self._records[name], now))
        return _sorted(changed)

    def states(self, now: float) -> list[VmState]:
        """All of them, sorted by name."""
        return [_state(name, record, now) for name, record in sorted(self._records.items())]

    def _put(self, name: str, new: _Record, now: float) -> VmState | None:
        old = self._records.get(name)
        for past in (old, old and old.before):
            if past is not None and (past.power, past.reason, past.run) == (new.power, new.reason, new.run):
                new = replace(new, since=past.since, reachable=past.reachable)
                break
        if new == old:
            return None
        self._records[name] = new
        return _state(name, new, now)


def _sorted(states: Iterable[VmState | None]) -> list[VmState]:
    return sorted((state for state in states if state is not None), key=lambda state: state.name)


def _state(name: str, record: _Record, now: float) -> VmState:
    return VmState(
        name=name,
        deployment=record.deployment,
        power=record.power,
        reason=record.reason,
        age_ms=max(0, round((now - record.since) * 1000)),
        reachable=record.reachable,
    )
