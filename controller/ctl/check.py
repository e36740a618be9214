"""`ctl check` and `ctl tune`: are the hosts fit for VMs, and what can be done about it from here."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Annotated, TypeVar

import msgspec
import typer
from msgspec.structs import replace

from controller import check as meaning
from controller import tune as tuning
from controller.advice import advice
from controller.ctl.commands import Commands
from controller.ctl.context import Ctl
from controller.ctl.following import Following
from controller.ctl.options import Json, Quiet, ctl_of, selecting
from controller.progress import waiting_line
from controller.render import json_text
from controller.selection import EVERYBODY, Selection
from controller.session import Happening, Job, Result, Session
from controller.status import CtlError, ExitStatus
from protocol.checks import HostFacts, TuneAnswer

app = Commands()

#: `ctl tune` without --apply where there is something to change, as `ctl plan` has it.
_CHANGES = 2

_T = TypeVar("_T")

Hosts = Annotated[
    list[str] | None, typer.Argument(metavar="[HOSTS...]", help="Only these hosts, as -w; all of the fleet without.")
]
Forward = Annotated[
    bool,
    typer.Option(
        "--forward",
        help="Hosts are to be routers for VMs (net.ipv4.ip_forward). Only with this is that ever turned on.",
    ),
]
MoreVms = Annotated[
    int, typer.Option("--vms", metavar="N", min=0, max=10_000_000, help="Reckon with so many VMs more than there are.")
]


class _Asked:
    """A job that is followed to its end, with what each host said in JSON."""

    def __init__(self, ctl: Ctl, job: Job, *, quiet: bool) -> None:
        self._began = time.time()
        self._said: dict[str, tuple[bytes, float]] = {}
        following = self.following = Following(job, ctl.terminal, quiet=quiet)

        def note(happening: Happening) -> None:
            if isinstance(happening, Result):
                self._said.update(dict.fromkeys(happening.hosts, (happening.stdout, time.time())))

        following.run(lambda: waiting_line(len(following.order), list(following.waiting), following.seconds), note)

    def answers(self, kind: type[_T]) -> dict[str, tuple[_T, float]]:
        """Each host's answer and when it came, by rank. What is none is said, and left out."""
        found: dict[str, tuple[_T, float]] = {}
        for host in self.following.order:
            said, at = self._said.get(host, (b"", 0.0))
            if said:
                try:
                    found[host] = (msgspec.json.decode(said, type=kind), at)
                except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                    self.following.terminal.say(f"{host}: its answer is none that an agent gives: {error}", bad=True)
                    self.garbled = True
        return found

    garbled = False

    def end(self) -> int:
        """The exit code of the job itself."""
        status = self.following.end()
        return max(status, ExitStatus.FAILED) if self.garbled else status


def _seen(
    ctl: Ctl, session: Session, hosts: Iterable[str] | None, *, quiet: bool
) -> tuple[dict[str, meaning.Seen], _Asked]:
    began = time.time()
    asked = _Asked(ctl, session.check(hosts), quiet=quiet)
    return {host: meaning.Seen(facts, began, at) for host, (facts, at) in asked.answers(HostFacts).items()}, asked


def _routes(session: Session) -> bool:
    """Whether there is a network of VMs in which hosts are the gateway."""
    return any(not net.isolated for net in session.nets())


@app.command(
    "check",
    epilog="""\b
Examples:
  ctl check
  ctl check h[0-31] --vms 10240
  ctl check --json | jq '.[] | select(.state == "bad")'""",
)
@selecting()
def check(
    *,
    context: typer.Context,
    hosts: Hosts = None,
    selection: Selection = EVERYBODY,
    forward: Forward = False,
    vms: MoreVms = 0,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """See whether hosts are fit for VMs: KVM, libvirt, QEMU, disk, MTU, kernel limits, modules, clock.

    Each agent looks at its own host and changes nothing. Hosts that agree are shown together: what is, what should be
    and why, and the next step. The exit code is 0 where all is well, 1 where something is bad or can't be told, and 3
    where hosts did not answer. For a host that is not in the tree there is ctl doctor.
    """
    ctl = ctl_of(context)
    with ctl.session() as session:
        chosen = session.choose(replace(selection, where=(*selection.where, *(hosts or ()))))
        size = meaning.size_of(session.status(), more_vms=vms)
        routes = _routes(session)
        seen, asked = _seen(ctl, session, chosen, quiet=quiet)
    found = meaning.judge_all(seen, size, forward=forward, routes=routes)
    if as_json:
        ctl.terminal.text(
            json_text([{**msgspec.to_builtins(one), "hosts": names} for one, names in meaning.folded(found)])
        )
    else:
        ctl.terminal.text(meaning.report(found))
    asked.following.show_failures()
    status = asked.end()
    if status == ExitStatus.OK and not all(map(meaning.well, found.values())):
        status = ExitStatus.FAILED
    raise typer.Exit(status)


@app.command(
    "tune",
    epilog="""\b
Examples:
  ctl tune                              what would be changed, and where
  ctl tune --vms 10240 --apply          change it, for as many VMs as that
  ctl tune --apply --forward            have hosts route for VMs as well, where they are their gateway
  ctl tune --undo                       put back what was there""",
)
@selecting()
def tune(
    *,
    context: typer.Context,
    hosts: Hosts = None,
    selection: Selection = EVERYBODY,
    apply: Annotated[bool, typer.Option("--apply", help="Change it, now and for the next boot.")] = False,
    undo: Annotated[bool, typer.Option("--undo", help="Put back all that was there before.")] = False,
    only: Annotated[
        list[str] | None, typer.Option("--only", metavar="KEY", help="Only this setting. May be repeated.")
    ] = None,
    forward: Forward = False,
    vms: MoreVms = 0,
    restart_libvirt: Annotated[
        bool,
        typer.Option("--restart-libvirt", help="Restart libvirt's daemon where it must take new settings; VMs go on."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Raise kernel and libvirt limits of hosts that ctl check finds too low.

    Without --apply nothing is changed: the exit code is 0 where there is nothing to do, and 2 where there is. What a
    setting was is written down on its host first, so --undo puts it back. Nothing is ever lowered, and no host becomes
    a router (net.ipv4.ip_forward) without --forward.
    """
    if apply and undo:
        raise CtlError("--apply and --undo exclude each other: choose one", ExitStatus.USAGE)
    if undo and only:
        raise CtlError("--undo puts back all that was changed: leave --only out", ExitStatus.USAGE)
    if restart_libvirt and not (apply or undo):
        raise CtlError("--restart-libvirt goes with --apply or --undo", ExitStatus.USAGE)
    keys = tuning.keys_of(only or ())
    ctl = ctl_of(context)
    with ctl.session() as session:
        chosen = session.choose(replace(selection, where=(*selection.where, *(hosts or ()))))
        if undo:
            job = session.tune({}, chosen, undo=True, restart_libvirt=restart_libvirt)
            raise typer.Exit(_show(ctl, _Asked(ctl, job, quiet=quiet), as_json=as_json))
        size = meaning.size_of(session.status(), more_vms=vms)
        # Who names the setting has asked for it.
        wanted = advice(size, forward=forward or meaning.FORWARD in (only or ()))
        wanted = {key: advised for key, advised in wanted.items() if key in keys}
        seen, asked = _seen(ctl, session, chosen, quiet=quiet)
        changes = {host: meaning.to_raise(each.facts, wanted) for host, each in seen.items()}
        stale = [host for host, each in seen.items() if each.facts.libvirt.stale] if restart_libvirt else []
        touched = [host for host in seen if changes[host] or host in stale]
        asked.following.show_failures()
        if not apply or not touched:
            ctl.terminal.text(json_text(tuning.planned_objects(changes)) if as_json else tuning.planned_text(changes))
            status = asked.end()
            raise typer.Exit(_CHANGES if touched and status == ExitStatus.OK else status)
        looked = asked.end()
        settings = {
            key: advised.least for key, advised in wanted.items() if any(key in each for each in changes.values())
        }
        job = session.tune(settings, touched, restart_libvirt=restart_libvirt)
        done = _show(ctl, _Asked(ctl, job, quiet=quiet), as_json=as_json)
    raise typer.Exit(max(looked, done))


def _show(ctl: Ctl, asked: _Asked, *, as_json: bool) -> int:
    """What came of a change. The exit code."""
    answers = {host: answer for host, (answer, _) in asked.answers(TuneAnswer).items()}
    if as_json:
        ctl.terminal.text(json_text(tuning.done_objects(answers)))
    else:
        ctl.terminal.text(tuning.done_text(answers))
    for problem in tuning.problems_of(answers):
        ctl.terminal.say(problem, bad=True)
    asked.following.show_failures()
    return asked.end()
