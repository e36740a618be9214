"""What hosts' answers say of VMs that must be kept: which are as specified, and which are gone. Pure."""

from __future__ import annotations

from collections.abc import Callable, Iterable

import msgspec

from protocol import ranks
from protocol.commands import Body, CreateVms, DestroyVms
from protocol.outcomes import Exited, Fold
from protocol.vms import VmChange, VmResult, VmSpec

_AS_SPECIFIED = (VmChange.CREATED, VmChange.STARTED, VmChange.UNCHANGED)
_GONE = (VmChange.REMOVED, VmChange.ABSENT)


def words(
    body: Body | None, folds: Iterable[Fold], name: Callable[[int], str]
) -> tuple[list[VmSpec], list[tuple[str, str, str]]]:
    """The specifications that hosts made VMs of, and the VMs that are gone: deployment, name and host.

    Raises nothing: what a host says in another form than it should is no word on any VM.
    """
    made: list[VmSpec] = []
    gone: list[tuple[str, str, str]] = []
    if not isinstance(body, CreateVms | DestroyVms):
        return made, gone
    for fold in folds:
        results = _results(fold)
        if isinstance(body, CreateVms):
            right = {result.name for result in results if result.change in _AS_SPECIFIED}
            made += [spec for spec in body.specs if spec.name in right]
        else:
            names = [result.name for result in results if result.change in _GONE]
            if body.names is not None:
                names = [one for one in names if one in set(body.names)]
            hosts = [name(rank) for rank in ranks.each(ranks.unpack(fold.ranks))]
            gone += [(body.deployment, one, host) for host in hosts for one in names]
    return made, gone


def _results(fold: Fold) -> list[VmResult]:
    if not isinstance(fold.outcome, Exited) or not fold.output.out:
        return []
    try:
        return msgspec.msgpack.decode(fold.output.out, type=list[VmResult])
    except msgspec.DecodeError:
        return []
