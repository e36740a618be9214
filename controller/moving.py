"""Moves of running VMs, from the service's side: who is asked what, and what becomes of those that are cut short.

A move is three commands: the host that takes the VM in makes ready, the one that has it moves it, the first lets it go
on. It is on record before the first and until both hosts have said where the VM is; whatever dies in between, the
service asks both, once they are there: the host that had the VM knows whether it has gone, and the other one follows.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Coroutine
from functools import partial
from typing import Any

import msgspec

from controller import api
from controller.jobs import Job
from controller.move_plan import MovePlan, Moving, Room, room_left
from controller.node import RootNode
from controller.on_record import Move, Vm
from controller.status import CtlError, ExitStatus
from controller.text_problems import some
from protocol import commands, ranks
from protocol.commands import Awaiting, Body, Hop, MoveVm, ReceiveVm, SettleMove
from protocol.outcomes import Cancelled, Exited, Fold, describe
from protocol.vms import VmChange, VmResult

log = logging.getLogger("canopy")

#: How long a host may take to make ready for a VM, and to say what became of one, in ms: its libvirt may be busy.
_READY_MS = 120_000
_SETTLE_MS = 120_000
#: Moves of which it is not known how they ended are asked about again after this, in seconds, while both hosts are up.
_AGAIN_S = 10.0


class Mover:
    """The moves of one fleet."""

    def __init__(self, node: RootNode) -> None:
        self._node = node
        #: The VMs that somebody sees to, by deployment and name.
        self._active: set[tuple[str, str]] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._timer: asyncio.TimerHandle | None = None
        node.on_links.append(self._mend)

    def close(self) -> None:
        """See to them no more; the next service does."""
        if self._timer is not None:
            self._timer.cancel()
        for task in self._tasks:
            task.cancel()

    def _begin(self, work: Coroutine[Any, Any, None]) -> None:
        task = self._node.loop.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._ended)

    def _ended(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and task.exception() is not None:
            log.error("a move of VMs", exc_info=task.exception())

    # --- what was asked for -------------------------------------------------------------------------------------------

    def move(self, request: api.MoveOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Move VMs. Raises CtlError, with all that is wrong and nothing begun."""
        moves = self._checked(request)
        node = self._node
        plan = MovePlan(
            moves,
            {} if request.overcommit else self._room(),
            per_host=request.per_host,
            per_link=request.per_link,
            site=self._site,
        )
        job = Job()
        job.ids.add(node.state.new_id())
        hosts = node.members.ranks_of({host for move in moves for host in (move.source, move.target)})
        run = _Run(self, job, plan, uid, request.timeout_ms)
        job.on_stop = run.stop
        self._begin(run.all())
        return job, hosts

    def _checked(self, request: api.MoveOn) -> list[Moving]:
        node = self._node
        vms = {(vm.deployment, vm.name): vm for vm in node.state.vms()}
        present = {host.name: rank for rank, host in node.members.present.items()}
        wrong: list[str] = []
        unknown = sorted({one.target for one in request.moves} - present.keys())
        if unknown:
            wrong.append(f"not in the fleet: {some(unknown)}")
        down = [name for name, rank in present.items() if not ranks.holds(node.relay.reachable, rank)]
        moves = []
        for one in request.moves:
            vm = vms.get((one.deployment, one.name))
            if vm is None:
                wrong.append(f"{one.name} is not on record")
            elif vm.host == one.target:
                wrong.append(f"{one.name} is on {vm.host} already")
            elif (vm.deployment, vm.name) in self._active:
                wrong.append(f"{one.name} is on the move")
            else:
                moves.append(_moving(vm, one.target))
        for host in sorted({host for move in moves for host in (move.source, move.target)} & set(down)):
            wrong.append(f"{host} is down")
        if len({(move.deployment, move.name) for move in moves}) < len(moves):
            wrong.append("a VM is named twice")
        if wrong:
            more = f" and {len(wrong) - 10} more" if len(wrong) > 10 else ""
            status = ExitStatus.NO_TARGET if unknown else ExitStatus.UNREACHABLE if down else ExitStatus.USAGE
            raise CtlError(f"nothing was moved: {'; '.join(wrong[:10])}{more}; see `ctl get map`", status)
        return moves

    def _room(self) -> dict[str, Room]:
        """What hosts have left, by what files declared of them, else by what they say of themselves."""
        node = self._node
        health = {host.name: node.known.health.get(rank) for rank, host in node.members.present.items()}
        return room_left(
            {host: None if told is None else told[0] for host, told in health.items()},
            node.state.capacities(),
            node.state.vms(),
        )

    def _site(self, host: str) -> str:
        return next((one.site for one in self._node.members.present.values() if one.name == host), "")

    # --- one move -----------------------------------------------------------------------------------------------------

    async def one(self, run: _Run, moving: Moving) -> VmResult:
        """Move one VM, or say why it did not."""
        key = (moving.deployment, moving.name)
        self._active.add(key)
        try:
            return await self._one(run, moving)
        finally:
            self._active.discard(key)
            self._node.vms_changed()

    async def _one(self, run: _Run, moving: Moving) -> VmResult:
        left = next(
            (one for one in self._moves() if (one.deployment, one.name) == (moving.deployment, moving.name)), None
        )
        if left is not None:
            where = await self._settled(run, left)
            if where != moving.source:
                change = VmChange.MOVED if where == moving.target else VmChange.FAILED
                detail = f"an earlier move of it had come to its end: it is on {where}"
                if where is None:
                    detail = f"an earlier move, from {left.source} to {left.target}, is still not settled"
                return VmResult(name=moving.name, change=change, detail=detail)
        spec = next((one for one in self._node.state.specs(moving.deployment) if one.name == moving.name), None)
        if spec is None:
            return _failed(moving, f"{moving.source} has not said that it made it as specified; spawn it again first")
        move = Move(
            deployment=moving.deployment,
            name=moving.name,
            uuid=spec.uuid,
            source=moving.source,
            target=moving.target,
        )
        self._node.state.put_move(move)
        id_, fold = await run.ask(
            move.target,
            ReceiveVm(deployment=move.deployment, spec=spec, source=self._hop(move.source)),
            timeout_ms=_READY_MS,
        )
        awaiting = _awaiting(fold)
        if awaiting is None:
            self._node.state.end_move(move, moved=False)
            return _failed(moving, f"{move.target}: {describe(fold.outcome)}")
        to = msgspec.structs.replace(self._hop(move.target), bulk_port=awaiting.port)
        body = MoveVm(deployment=move.deployment, name=move.name, to=to, of=id_, directory=awaiting.directory)
        _, fold = await run.ask(move.source, body, timeout_ms=run.timeout_ms, stoppable=move)
        why = _why(fold)
        where = await self._settled(run, move)
        if where == move.target:
            return VmResult(name=move.name, change=VmChange.MOVED)
        if move.name in run.notes:
            why = f"{why}; {run.notes[move.name]}"
        if where is None:
            why += "; whether it has gone is asked as soon as both hosts answer"
        return _failed(moving, why.removeprefix("; "))

    async def _settled(self, run: _Run, move: Move) -> str | None:
        """Which host a VM is on that was to move, None while nobody can say. It goes on there."""
        fates = SettleMove(deployment=move.deployment, name=move.name, uuid=move.uuid)
        _, fold = await run.ask(move.source, fates, timeout_ms=_SETTLE_MS)
        said = _result(fold)
        if said is None or said.change not in (VmChange.UNCHANGED, VmChange.REMOVED, VmChange.ABSENT):
            log.warning("%s: %s says nothing of where it is: %s", move.name, move.source, _why(fold))
            self._mend_later()
            return None
        gone = said.change is not VmChange.UNCHANGED
        _, fold = await run.ask(move.target, msgspec.structs.replace(fates, keep=gone), timeout_ms=_SETTLE_MS)
        said = _result(fold)
        if said is None or said.change is VmChange.FAILED:
            log.warning("%s: %s does not settle it: %s", move.name, move.target, _why(fold))
            self._mend_later()
            return None
        if not gone and said.detail:
            run.notes[move.name] = f"{move.target}: {said.detail}"
        there = gone and said.change in (VmChange.MOVED, VmChange.UNCHANGED)
        self._node.state.end_move(move, moved=there)
        return move.target if there else move.source

    def _hop(self, host: str) -> Hop:
        (rank,) = self._node.members.ranks_of([host])
        (hop,) = self._node.members.order([rank], self._node.relay.reachable)
        return hop

    # --- those that were cut short ------------------------------------------------------------------------------------

    def _moves(self) -> list[Move]:
        return self._node.state.moves()

    def _mend_later(self) -> None:
        if self._timer is None:
            self._timer = self._node.loop.call_later(_AGAIN_S, self._mend)

    def _mend(self) -> None:
        """Ask about moves that nobody sees to, where both hosts are there."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        node = self._node
        up = {host.name for rank, host in node.members.present.items() if ranks.holds(node.relay.reachable, rank)}
        for move in self._moves():
            key = (move.deployment, move.name)
            if key not in self._active and {move.source, move.target} <= up:
                self._active.add(key)
                self._begin(self._mend_one(move))

    async def _mend_one(self, move: Move) -> None:
        key = (move.deployment, move.name)
        try:
            job = Job()
            job.ids.add(self._node.state.new_id())
            where = await self._settled(_Run(self, job, MovePlan([], {}, per_host=1, per_link=1, site=str), 0, 0), move)
            log.info("%s, whose move from %s to %s was cut short, is on %s", move.name, move.source, move.target, where)
        finally:
            self._active.discard(key)
            self._node.vms_changed()

    @property
    def node(self) -> RootNode:
        """The root."""
        return self._node


class _Run:
    """What one client asked for."""

    def __init__(self, mover: Mover, job: Job, plan: MovePlan, uid: int, timeout_ms: int) -> None:
        self._mover, self._node = mover, mover.node
        self._job, self._plan, self._uid = job, plan, uid
        self.timeout_ms = timeout_ms
        self._running: set[Job] = set()
        #: What the other host said of why a VM did not come.
        self.notes: dict[str, str] = {}
        self._stopped = False

    async def all(self) -> None:
        """All moves, as many at a time as the plan lets."""
        tasks: dict[asyncio.Task[VmResult], Moving] = {}
        try:
            while True:
                for move in self._plan.begin():
                    tasks[asyncio.create_task(self._mover.one(self, move))] = move
                if not tasks:
                    break
                done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    self._over(tasks.pop(task), task)
            for move in self._plan.drop_waiting():
                self._say(move.source, _failed(move, f"it can't begin: {self._plan.why_not(move)}"))
        finally:
            for task in tasks:
                task.cancel()
            self._job.say(api.Settled())
            self._job.say(None)

    def _over(self, move: Moving, task: asyncio.Task[VmResult]) -> None:
        error = task.exception()
        if error is not None:
            log.error("the move of %s", move.name, exc_info=error)
            result = _failed(move, f"the service failed at it; its log says how: {type(error).__name__}")
        else:
            result = task.result()
        moved = result.change is VmChange.MOVED
        self._plan.ended(move, moved=moved)
        self._say(move.target if moved else move.source, result)

    def _say(self, host: str, result: VmResult) -> None:
        self._job.say(api.VmsDone(host=host, results=(result,)))

    def stop(self) -> None:
        """Begin no more, and end those that are under way."""
        self._stopped = True
        for move in self._plan.drop_waiting():
            self._say(move.source, _failed(move, "it was cancelled before it began"))
        for inner in list(self._running):
            self._node.cancel(inner)

    async def ask(self, host: str, body: Body, *, timeout_ms: int, stoppable: Move | None = None) -> tuple[int, Fold]:
        """One command for one host, as a part of the job: its number and its outcome. One that is `stoppable` is ended
        when the job is, and tells how far it is."""
        node = self._node
        (rank,) = node.members.ranks_of([host])
        if stoppable is not None and self._stopped:
            return 0, Fold(ranks.pack(ranks.only(rank)), Cancelled(ran=False))
        inner = Job()
        inner.ids |= self._job.ids
        what = msgspec.json.encode([_NAMES[type(body)], getattr(body, "deployment", "")]).decode()
        id_ = node.give(inner, [rank], body, timeout_ms=timeout_ms, uid=self._uid, what=what)
        inner.seal()
        if stoppable is not None:
            self._running.add(inner)
            inner.on_stop = partial(self._running.discard, inner)
        found: Fold | None = None
        try:
            while (reply := await inner.replies.get()) is not None:
                if isinstance(reply, api.Folded):
                    found = reply.folds[0]
                elif isinstance(reply, api.Streamed) and stoppable is not None:
                    self._moving(stoppable, reply.data)
        finally:
            self._running.discard(inner)
        if found is None:
            raise RuntimeError(f"command {id_} ended without an outcome")
        return id_, found

    def _moving(self, move: Move, data: bytes) -> None:
        try:
            far = msgspec.msgpack.decode(data, type=commands.Moving)
        except msgspec.DecodeError:
            return  # it is only shown
        self._job.tell_client(api.VmMoving(deployment=move.deployment, name=move.name, done=far.done, left=far.left))


_NAMES: dict[type, str] = {ReceiveVm: "receive vm", MoveVm: "move vm", SettleMove: "settle move"}


def _moving(vm: Vm, target: str) -> Moving:
    return Moving(
        deployment=vm.deployment,
        name=vm.name,
        source=vm.host,
        target=target,
        cpu=vm.cpu,
        memory_mib=vm.memory_mib,
    )


def _failed(move: Moving, why: str) -> VmResult:
    return VmResult(name=move.name, change=VmChange.FAILED, detail=why)


def _awaiting(fold: Fold) -> Awaiting | None:
    if fold.outcome != Exited(0):
        return None
    try:
        return msgspec.msgpack.decode(fold.output.out, type=Awaiting)
    except msgspec.DecodeError:
        return None


def _result(fold: Fold) -> VmResult | None:
    """A host's word on the one VM that it was asked about."""
    if not isinstance(fold.outcome, Exited):
        return None
    try:
        results = msgspec.msgpack.decode(fold.output.out, type=list[VmResult])
    except msgspec.DecodeError:
        return None
    return results[0] if len(results) == 1 else None


def _why(fold: Fold) -> str:
    said = _result(fold)
    return describe(fold.outcome) if said is None else said.detail
