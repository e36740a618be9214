"""What clients of the service ask for, each request turned into commands of the tree or an answer from what is
known."""

from __future__ import annotations

import os
from functools import partial
from pathlib import Path

import msgspec

from agent.keyring import to_text
from agent.version import VERSION
from controller import api, labels
from controller.image_requests import ImageRequests
from controller.job_records import is_pull, outcomes_of, telling
from controller.jobs import Job, as_late, translated, translation
from controller.node import RootNode
from controller.on_record import Vm
from controller.pulling import Pulling
from controller.pushing import Pushing
from controller.replies import Replies
from controller.rolling import Roll
from controller.runs import run_body
from controller.shares import at_a_time, share
from controller.state import Host
from controller.status import CtlError, ExitStatus
from protocol import ranks
from protocol.commands import FetchOutput, Leave, Run
from protocol.outcomes import Lost, TimedOut, succeeded
from protocol.trust import open_command
from protocol.wishes import Wishes

#: How long departing agents may take until they are gone from the tree, in seconds: children go before their parents.
_DEPART_WITHIN = 15.0
#: Lost outcomes that are told of a host.
_LOST_SHOWN = 5
#: Jobs that are named where one was asked for that is not there.
_NAMED = 3


class Requests:
    """Answers to requests. Methods that begin a command return its Job and the hosts that it went to, by rank."""

    def __init__(self, node: RootNode, directory: Path, images: ImageRequests, listen: str) -> None:
        self._node = node
        self._pushing = Pushing(node, directory, images)
        self._pulling = Pulling(node, listen, directory / "pulls")

    # --- questions ----------------------------------------------------------------------------------------------------

    def status(self) -> api.Status:
        """The fleet as it is known now."""
        node, now = self._node, self._node.loop.time()
        incarnations, carried = node.state.incarnations(), node.state.labels()
        return api.Status(
            fleet=node.fleet,
            version=VERSION,
            pid=os.getpid(),
            uptime_s=now - node.began,
            fanout=node.members.fanout,
            hosts=tuple(self._host_status(host, now, incarnations, carried) for host in node.members.present.values()),
            vms=tuple(self._vm_status(vm, now) for vm in node.state.vms()),
        )

    def _host_status(
        self, host: Host, now: float, incarnations: dict[int, int], carried: dict[str, dict[str, str]]
    ) -> api.HostStatus:
        node, rank = self._node, host.rank
        link = node.relay.links.get(rank)
        health = node.known.health.get(rank)
        linked = node.known.linked_at.get(rank)
        up = ranks.holds(node.relay.reachable, rank)
        parent = node.members.name(link.parent) if link is not None and link.parent is not None else None
        return api.HostStatus(
            name=host.name,
            rank=rank,
            site=host.site,
            address=host.address,
            up=up,
            parent=parent if up else None,
            planned_parent=None if host.parent is None else node.members.name(host.parent),
            since_s=None if linked is None else now - linked,
            why=self._why(rank, up=up),
            digest=host.digest,
            facts=host.facts,
            health=None if health is None else health[0],
            health_age_s=None if health is None else now - health[1],
            incarnation=incarnations.get(rank) if link is None else link.incarnation,
            labels=carried.get(host.name, {}),
        )

    def host(self, name: str) -> api.HostKnown:
        """All that is known of one host. Raises CtlError."""
        node, now = self._node, self._node.loop.time()
        (rank,) = node.members.ranks_of([name])
        host, link = node.members.by_rank[rank], node.relay.links.get(rank)
        now_ms = node.clock_ms(now)
        return api.HostKnown(
            status=self._host_status(host, now, node.state.incarnations(), node.state.labels()),
            attached=None if link is None else link.up,
            below=node.members.name(link.parent) if link is not None and link.parent is not None else None,
            epoch=0 if link is None else link.epoch,
            said="" if link is None else link.why,
            key=to_text(host.key),
            control_port=host.control_port,
            bulk_port=host.bulk_port,
            ancestors=tuple(
                api.Ancestor(name=above.name, address=above.address, control_port=above.control_port)
                for above in node.members.plan(rank).ancestors
            ),
            plan_version=node.members.version,
            unacknowledged=node.members.stale.get(rank),
            vms=sum(vm.host == name for vm in node.state.vms()),
            lost=tuple(
                api.LostOutcome(
                    job=record.job, what=record.what, ago_s=(now_ms - record.issued_ms) / 1000, why=outcome.why
                )
                for record, outcome in node.state.lost_on(rank, _LOST_SHOWN)
            ),
        )

    def _why(self, rank: int, *, up: bool) -> str:
        """What a person should know about where a host hangs, or why it does not."""
        link = self._node.relay.links.get(rank)
        if link is None:
            return "has not attached since the service began"
        if not link.up:
            return link.why
        if not up and link.parent is not None:
            return f"its parent {self._node.members.name(link.parent)} is not in the tree"
        return link.why if link.parent != self._node.members.by_rank[rank].parent else ""

    def _vm_status(self, vm: Vm, now: float) -> api.VmStatus:
        by_host = self._node.known.vms.get((vm.deployment, vm.name), {})
        heard = next((one for rank, one in by_host.items() if self._node.members.name(rank) == vm.host), None)
        return api.VmStatus(
            name=vm.name,
            deployment=vm.deployment,
            host=vm.host,
            ip=vm.ip,
            mac=vm.mac,
            vcpus=vm.vcpus,
            memory_mib=vm.memory_mib,
            state=None if heard is None else heard.state,
            age_s=None if heard is None else now - heard.at,
        )

    # --- jobs ---------------------------------------------------------------------------------------------------------

    def jobs(self, most: int) -> api.Jobs:
        """The latest jobs."""
        return api.Jobs(jobs=tuple(self._job_status(job) for job in self._node.state.latest_jobs(most)))

    def _job_status(self, job: int) -> api.JobStatus:
        state, now_ms = self._node.state, self._node.clock_ms(self._node.loop.time())
        records = state.commands_of(job)
        targets = ok = failed = lost = 0
        for record in telling(records):
            targets += ranks.count(ranks.unpack(record.delivery.targets))
            for fold in outcomes_of(state, record, goes_on=job in self._pulling.live):
                count = ranks.count(ranks.unpack(fold.ranks))
                if succeeded(fold.outcome):
                    ok += count
                elif isinstance(fold.outcome, Lost | TimedOut):
                    lost += count
                else:
                    failed += count
        began = min(record.issued_ms for record in records)
        ends = [record.settled_ms for record in records]
        roll = state.roll(job)
        if roll is not None:
            targets = ranks.count(ranks.unpack(roll.targets))
            ends.append(None)
        if job in self._pulling.live:
            ends.append(None)
        last = None if None in ends else max(end for end in ends if end is not None)
        return api.JobStatus(
            id=job,
            uid=records[0].uid,
            what=records[0].what,
            targets=targets,
            ok=ok,
            failed=failed,
            lost=lost,
            missing=targets - ok - failed - lost,
            began_s_ago=(now_ms - began) / 1000,
            took_s=None if last is None else (last - began) / 1000,
        )

    def failed(self, job: int | None) -> api.FailedHosts:
        """Where a job did not end well. Raises CtlError."""
        state = self._node.state
        number = job if job is not None else next(iter(state.latest_jobs(1)), None)
        records = [] if number is None else state.commands_of(number)
        if number is None or not records:
            raise self._no_job(number, ExitStatus.NO_TARGET)
        failed = ranks.NONE
        for record in telling(records):
            for fold in outcomes_of(state, record, goes_on=number in self._pulling.live):
                if not succeeded(fold.outcome):
                    failed |= ranks.unpack(fold.ranks)
        present = self._node.members.present
        return api.FailedHosts(
            job=number, hosts=tuple(present[rank].name for rank in ranks.each(failed) if rank in present)
        )

    def _no_job(self, number: int | None, status: ExitStatus) -> CtlError:
        latest = [str(one) for one in self._node.state.latest_jobs(_NAMED)]
        if not latest or number is None:
            return CtlError("no job has run yet: `ctl jobs` lists them", status)
        return CtlError(f"there is no job {number}: the latest are {', '.join(latest)}; `ctl jobs` lists them", status)

    def follow(self, request: api.FollowJob) -> tuple[Job, api.Accepted, Replies]:
        """A job by its number: a queue of what is on record, and of what still comes. Raises CtlError."""
        node, id_ = self._node, request.id
        records = node.state.commands_of(id_)
        if not records:
            raise self._no_job(id_, ExitStatus.USAGE)
        live = self._pulling.live.get(id_) or next((node.jobs[one.id] for one in records if one.id in node.jobs), None)
        listens = live is not None and request.wait
        queue = live.listen() if live and listens else Replies()
        roll = node.state.roll(id_)
        to_come = ranks.NONE if roll is None else ranks.unpack(roll.targets)
        hosts = {rank: node.members.name(rank) for rank in ranks.each(to_come)}
        past = Job()
        for record in telling(records):
            delivery = record.delivery
            hosts |= {rank: node.members.name(rank) for rank in ranks.each(ranks.unpack(delivery.targets))}
            if is_pull(record):
                folds = tuple(outcomes_of(node.state, record, goes_on=id_ in self._pulling.live))
                queue.put(api.Folded(folds=folds))
                continue
            body = open_command(delivery.payload, delivery.signature, node.signer.verify_key, node.fleet).body
            translate = translation(body, node.members.name)
            for row in node.state.outcome_rows(record.id):
                queue.put_recorded(translated(translate, partial(node.state.outcome, row)))
            for row in node.state.late_rows(record.id):
                queue.put_recorded(translated(as_late(translate), partial(node.state.late, row)))
        if not listens:
            queue.put(api.Settled() if live is None else api.OnRecord())
            queue.put(None)
        return live or past, api.Accepted(id=id_, hosts=hosts, what=records[0].what), queue

    def cancel(self, id_: int) -> api.Done:
        """Stop a job everywhere. Raises CtlError where it does not run."""
        running = {job for number, job in self._node.jobs.items() if min(job.ids) == id_ or number == id_}
        if id_ in self._pulling.live:
            running = {self._pulling.live[id_]}
        if not running:
            raise CtlError(f"job {id_} does not run: `ctl jobs` lists them", ExitStatus.USAGE)
        for job in running:
            self._node.cancel(job)
        return api.Done()

    # --- the fleet ----------------------------------------------------------------------------------------------------

    def enrol(self, request: api.Enrol) -> api.Enrolled:
        """Take a host in. Raises CtlError."""
        node = self._node
        # A host that was known and hangs nowhere now is no parent for newcomers; one that has never attached yet is
        # on its way, as this one is.
        down = [
            rank
            for rank in node.members.present
            if rank in node.relay.links and not ranks.holds(node.relay.reachable, rank)
        ]
        host = node.members.enrol(request, down)
        node.membership_changed()
        return api.Enrolled(welcome=node.welcome(host.rank))

    def set_labels(self, request: api.SetLabels) -> api.Done:
        """Label hosts. Raises CtlError with all that is wrong, and then nothing is changed."""
        hosts = self._node.members.ranks_of(request.hosts)
        labels.check(request.put, request.drop)
        self._node.state.set_labels(hosts.values(), request.put, request.drop)
        return api.Done()

    async def wait_for(self, request: api.Await) -> api.Awaited:
        """Wait until hosts are in the tree."""
        node = self._node
        wanted = node.members.ranks_of(request.hosts) if request.hosts else {}
        mask = ranks.union(wanted)
        least = {rank: request.newer_than[name] for rank, name in wanted.items() if name in request.newer_than}

        def missing() -> int:
            links = node.relay.links
            old = [rank for rank, last in least.items() if rank not in links or links[rank].incarnation <= last]
            return mask & ~node.relay.reachable | ranks.union(old)

        deadline = node.loop.time() + request.within_ms / 1000
        await node.wait_until(lambda: not missing(), request.within_ms / 1000)
        if request.answering:
            there = mask & ~missing()
            silent = there & ~await node.roll_calls.call(there, max(0.1, deadline - node.loop.time()))
        else:
            silent = ranks.NONE
        reachable = node.relay.reachable
        return api.Awaited(
            missing={
                wanted[rank]: "its agent has not started anew"
                if ranks.holds(reachable, rank)
                else self._why(rank, up=False)
                for rank in ranks.each(missing())
            }
            | {wanted[rank]: "its agent does not answer" for rank in ranks.each(silent & ~missing())}
        )

    # --- commands -----------------------------------------------------------------------------------------------------

    def run(self, request: api.RunOn, uid: int) -> tuple[Job, dict[int, str]]:
        """Run an argument vector. Raises CtlError where it can't be asked so."""
        hosts = self._node.members.ranks_of(request.hosts)
        body = run_body(request)
        job = Job()
        what = msgspec.json.encode(["run", *request.argv]).decode()
        if request.batch:
            self._roll(request, job, hosts, body, uid=uid, what=what)
            return job, hosts
        self._node.give(job, hosts, body, timeout_ms=request.timeout_ms, uid=uid, what=what)
        job.seal()
        return job, hosts

    def _roll(self, request: api.RunOn, job: Job, hosts: dict[int, str], body: Run, *, uid: int, what: str) -> None:
        roll = Roll(
            job=self._node.state.new_id(),
            uid=uid,
            what=what,
            body=body,
            targets=ranks.pack(ranks.union(hosts)),
            size=at_a_time("--batch", request.batch, len(hosts)),
            may_fail=share("--max-fail", request.max_fail or "0", len(hosts)),
            timeout_ms=request.timeout_ms,
        )
        self._node.state.put_roll(roll)
        self._node.roll(roll, job)

    def output(self, request: api.GetOutput, uid: int) -> tuple[Job, dict[int, str]]:
        """Fetch what a host has in its spool of a job. Raises CtlError."""
        node = self._node
        hosts = node.members.ranks_of([request.host])
        (rank,) = hosts
        records = node.state.commands_of(request.job)
        if not records:
            raise self._no_job(request.job, ExitStatus.USAGE)
        of = [record.id for record in records if ranks.holds(ranks.unpack(record.delivery.targets), rank)]
        if not of:
            raise CtlError(f"{request.host} was no target of job {request.job}", ExitStatus.NO_TARGET)
        job = Job()
        what = msgspec.json.encode(["fetch output", str(request.job), request.host]).decode()
        node.give(job, hosts, FetchOutput(of=of[-1]), uid=uid, what=what)
        job.seal()
        return job, hosts

    async def push(self, request: api.PushTo, uid: int) -> tuple[Job, dict[int, str]]:
        """Push files: list and digest them first, in a thread."""
        hosts = self._node.members.ranks_of(request.hosts)
        return await self._pushing.push(request, hosts, uid), hosts

    def pull(self, request: api.PullFrom, uid: int) -> tuple[Job, dict[int, str]]:
        """Pull files."""
        hosts = self._node.members.ranks_of(request.hosts)
        return self._pulling.pull(request, hosts, uid), hosts

    async def push_file(
        self, hosts: dict[int, str], source: Path, path: str, mode: int, uid: int
    ) -> tuple[Job, dict[int, str]]:
        """Push a file of the service's to `path` on hosts by rank. Raises CtlError."""
        folder, _, name = path.rpartition("/")
        wishes = Wishes(mode=mode, times=False)
        request = api.PushTo(hosts=None, sources=(str(source),), folder=f"{folder}/", name=name, wishes=wishes)
        return await self._pushing.push(request, hosts, uid), hosts

    def down(self, request: api.DownOn, uid: int) -> tuple[Job, dict[int, str]]:
        """End agents. Those that said yes and are gone are no members any more."""
        node = self._node
        hosts = node.members.ranks_of(request.hosts)
        job = Job()
        mask = ranks.union(hosts)

        async def gone() -> None:
            node.forgetting.tell_all()
            await node.wait_until(lambda: not mask & node.relay.reachable, _DEPART_WITHIN)
            left = [rank for rank in hosts if not ranks.holds(node.relay.reachable, rank)]
            node.members.remove(left)
            node.membership_changed()

        job.at_end = gone
        body = Leave(purge=request.purge, vms=request.vms)
        node.give(job, hosts, body, uid=uid, what=msgspec.json.encode(["down"]).decode())
        job.seal()
        return job, hosts
