"""`ctl up` and `ctl down`: the beginning and the end of a fleet."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from msgspec.structs import replace

from controller import progress, render
from controller.ctl.commands import Commands, Gathering, mistakes_of
from controller.ctl.context import Ctl
from controller.ctl.options import Json, Quiet, ctl_of, seconds, selecting
from controller.hosts import fold
from controller.inventory import in_kavlan, site_from, write_hosts
from controller.labels import parse as parse_labels
from controller.selection import EVERYBODY, Selection
from controller.session import Session, exit_status
from controller.shares import at_a_time, needed
from controller.status import CtlError, ExitStatus
from controller.terminal import Live, Terminal
from protocol.limits import MAX_RANK
from protocol.vms import VmChange

if TYPE_CHECKING:
    from controller.up import DownReport, UpReport

app = Commands()


def _nodes(path: Path, terminal: Terminal) -> tuple[str, ...]:
    """The nodes of an infra.conf that are not offline."""
    from controller.spawn_plan import load

    infra, warnings = load(path)
    for warning in warnings:
        terminal.say(str(warning))
    return tuple(node.name for node in infra.nodes if not node.offline)


@app.command(
    "up",
    cls=Gathering,
    epilog="""\b
Examples:
  ctl up -w h[0-63]
  ctl up infra.conf -l root                  the nodes of an infra.conf
  ctl up --hosts "$OAR_NODE_FILE" --min-up 90%
  oarprint host | ctl up --hosts -
  ctl up -w h[0-63] -F ~/.ssh/cluster.conf   jump hosts and keys as that file has them
  ctl up -w @rack1 --label rack=1            a group of groups.toml; ctl broadcast -l rack=1 finds them
  ctl up --local 8                           eight agents on this machine, for a first look""",
)
# `-l` is ssh's here, and hosts that were never up have no labels.
@selecting(without=("labels", "hostfile"))
def up(
    *,
    context: typer.Context,
    infra: Annotated[Path | None, typer.Argument(metavar="INFRA.CONF", help="Start its nodes.")] = None,
    selection: Selection = EVERYBODY,
    hosts_file: Annotated[
        Path | None,
        typer.Option(
            "--hosts", "--hostfile", metavar="FILE", help="Start those in a file, one a line; - is standard input."
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option("--label", metavar="KEY=VALUE", help="Label the hosts so, for -l. May be repeated."),
    ] = None,
    local: Annotated[
        str | None,
        typer.Option(
            "--local", metavar="N|INFRA.CONF", help="Start agents on this machine: no SSH and no root needed."
        ),
    ] = None,
    libvirt: Annotated[
        str | None,
        typer.Option("--libvirt", metavar="URI", help="The libvirt of --local agents; {dir} is each one's directory."),
    ] = None,
    ssh_config: Annotated[
        Path | None, typer.Option("-F", "--ssh-config", metavar="FILE", help="ssh's -F: another configuration file.")
    ] = None,
    login: Annotated[
        str | None, typer.Option("-l", "--login", metavar="USER", help="ssh's -l: log in as this user.")
    ] = None,
    fanout: Annotated[
        int,
        typer.Option(
            metavar="N", min=1, max=1024, help="Most SSH sessions at a time from here, and children of a relay."
        ),
    ] = 32,
    min_up: Annotated[
        str,
        typer.Option(metavar="SHARE", help="How many must be up for success: a percentage (rounded down) or a number."),
    ] = "95%",
    tries: Annotated[int, typer.Option(metavar="N", min=1, max=100, help="How often a host is tried.")] = 3,
    connect_timeout: Annotated[
        float,
        typer.Option(metavar="SECONDS", min=0.1, callback=seconds, help="How long a host may take to answer on SSH."),
    ] = 10.0,
    flat: Annotated[
        bool, typer.Option("--flat", help="Start all from here: for hosts that can't reach each other by SSH.")
    ] = False,
    wave: Annotated[
        str,
        typer.Option(
            metavar="SHARE", help="How many outdated agents are replaced at a time: a percentage or a number."
        ),
    ] = "10%",
    address: Annotated[
        str | None, typer.Option(metavar="IP", help="Where hosts reach this machine, if not where SSH comes from.")
    ] = None,
    site_from_: Annotated[
        str | None,
        typer.Option("--site-from", metavar="REGEX", help="A host's site: the first group of this in its name."),
    ] = None,
    kavlan: Annotated[
        int | None,
        typer.Option("--kavlan", metavar="N", min=1, help="Reach hosts by their names in this KaVLAN of Grid'5000."),
    ] = None,
    good_file: Annotated[
        Path | None, typer.Option("--good-file", metavar="FILE", help="Write the hosts that are up there.")
    ] = None,
    bad_file: Annotated[
        Path | None, typer.Option("--bad-file", metavar="FILE", help="Write the others there, with the reasons.")
    ] = None,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """Start an agent on each host, over SSH, and take it into the fleet.

    Hosts need sshd and Python 3.10 or later. Run it again at any time: what runs stays, what is missing is started,
    what is outdated is replaced. SSH is yours, with your configuration, keys and known hosts.

    Outdated agents are replaced in waves, those without children first. Where one does not come back it is put back on
    the version that it had, and the upgrade stops. VMs stay, and commands that run on the host are told as lost.
    """
    ctl = ctl_of(context)
    wrong = mistakes_of(context)
    put: Mapping[str, str] = {}
    sites = site_from(None)
    names: tuple[str, ...] = ()
    with wrong:
        put = _labels(label or ())
    with wrong:
        sites = site_from(site_from_)
    with wrong:
        if local is None and libvirt is not None:
            raise CtlError("--libvirt goes with --local: elsewhere agents use the host's own", ExitStatus.USAGE)
        if local is not None and (infra is not None or selection or hosts_file is not None):
            raise CtlError("--local makes its hosts itself: leave -w, --hosts and the infra.conf out", ExitStatus.USAGE)
    with wrong:
        if local is not None:
            names = _local_names(local, ctl.terminal)
        else:
            asked = _asked(ctl, infra, selection, hosts_file)
            names = tuple(dict.fromkeys(in_kavlan(name, kavlan) for name in asked))
    with wrong:
        minimum = needed("--min-up", min_up, MAX_RANK if wrong and not names else len(names))
    with wrong:
        at_a_time("--wave", wave, len(names))
    wrong.check()
    outcome_files = (good_file, bad_file)
    if local is not None:
        report = _local_up(ctl, names, fanout, sites, libvirt=libvirt, put=put, quiet=quiet)
        raise typer.Exit(_report(ctl.terminal, names, report, minimum, outcome_files, as_json=as_json))
    from controller.bootstrap import Progress
    from controller.up import UpOptions
    from controller.up import up as bring_up

    options = UpOptions(
        fleet=ctl.fleet,
        hosts=names,
        ssh_config=None if ssh_config is None else ssh_config.absolute(),
        login=login,
        fanout=fanout,
        tries=tries,
        connect_timeout=connect_timeout,
        flat=flat,
        address=address,
        wave=wave,
        site_of=sites,
    )
    began = time.monotonic()
    latest = Progress(total=len(names), started=0, current=0, failed=0)

    def note(now: Progress) -> None:
        nonlocal latest
        latest = now
        if now.notice:
            ctl.terminal.say(now.notice)

    def line() -> str:
        return progress.up_line(len(names), latest.settled, latest.failed, time.monotonic() - began)

    with Live(ctl.terminal, line, quiet=quiet):
        report = bring_up(options, note)
    _label(ctl, report, put)
    raise typer.Exit(_report(ctl.terminal, names, report, minimum, outcome_files, as_json=as_json))


def _label(ctl: Ctl, report: UpReport, put: Mapping[str, str]) -> None:
    if put and report.up:
        ctl.session().label(report.up, put)


def _labels(given: Sequence[str]) -> Mapping[str, str]:
    put, drop = parse_labels(given)
    if drop:
        raise CtlError("--label gives labels: `ctl label` takes them away", ExitStatus.USAGE)
    return put


def _asked(ctl: Ctl, infra: Path | None, selection: Selection, hosts_file: Path | None) -> tuple[str, ...]:
    asked = selection if hosts_file is None else replace(selection, hostfile=(str(hosts_file),))
    if infra is None and not asked.adds:
        raise CtlError("which hosts? Give -w h[0-63], --hosts FILE, or an infra.conf", ExitStatus.USAGE)
    if infra is not None:
        asked = replace(asked, where=(*asked.where, *_nodes(infra, ctl.terminal)))
    if not asked.adds:
        raise CtlError(f"no host is left to start: {infra} has no node that is not offline", ExitStatus.NO_TARGET)
    return Session(ctl.fleet).choose(asked) or ()


def _local_names(local: str, terminal: Terminal) -> tuple[str, ...]:
    if local.isdecimal() and len(local) < 10:
        # An agent takes 30 MB and its start 0.1 s of a core; beyond this nobody wants it on one machine.
        if not 1 <= int(local) <= 1024:
            raise CtlError("--local takes 1 to 1024 agents", ExitStatus.USAGE)
        return tuple(f"h{number}" for number in range(int(local)))
    return _nodes(Path(local), terminal)


def _local_up(
    ctl: Ctl,
    names: Sequence[str],
    fanout: int,
    sites: Callable[[str], str],
    *,
    libvirt: str | None,
    put: Mapping[str, str],
    quiet: bool,
) -> UpReport:
    from controller.local import local_up

    began = time.monotonic()
    with Live(ctl.terminal, lambda: f"starting {len(names)} agents, {time.monotonic() - began:.0f} s", quiet=quiet):
        failed = local_up(ctl.fleet, names, fanout, site_of=sites, libvirt=libvirt)
    from controller.up import UpReport

    good = tuple(name for name in names if name not in failed)
    report = UpReport(started=good, current=(), failed=failed)
    _label(ctl, report, put)
    return report


def _by_reason(troubles: dict[str, str]) -> dict[str, list[str]]:
    reasons: dict[str, list[str]] = {}
    for name, why in troubles.items():
        reasons.setdefault(why, []).append(name)
    return reasons


def _report(
    terminal: Terminal,
    names: Sequence[str],
    report: UpReport,
    minimum: int,
    files: tuple[Path | None, Path | None],
    *,
    as_json: bool,
) -> int:
    """Say who is up and why the others are not, and who runs which version; `files` are for the ones and the others.
    The exit code."""
    good, bad = files
    if good is not None:
        write_hosts(good, dict.fromkeys((name for name in names if name not in report.failed), ""))
    if bad is not None:
        write_hosts(bad, report.failed)
    failed, reasons, outdated = report.failed, _by_reason(report.failed), _by_reason(report.outdated)
    up = [name for name in names if name not in failed]
    met = len(up) >= minimum
    if as_json:
        found = {
            "up": up,
            "nodeset": fold(up),
            "failed": [{"hosts": hosts, "nodeset": fold(hosts), "why": why} for why, hosts in reasons.items()],
            "outdated": [{"hosts": hosts, "nodeset": fold(hosts), "why": why} for why, hosts in outdated.items()],
            "stopped": report.stopped,
            "needed": minimum,
            "met": met,
        }
        terminal.text(render.json_text(found))
    else:
        terminal.text(f"{len(up)} of {len(names)} hosts are up\n")
    if reasons:
        told = "; ".join(f"{fold(hosts)}: {render.clean(why)}" for why, hosts in reasons.items())
        terminal.say(f"{len(failed)} failed: {told}", bad=True)
    if report.outdated:
        new = [name for name in up if name not in report.outdated]
        terminal.say(f"on the new version: {fold(new) if new else 'none'}")
        for why, hosts in outdated.items():
            terminal.say(f"on the old version: {render.label(hosts)}: {render.clean(why)}", bad=True)
    if report.stopped:
        terminal.say(f"ctl: the upgrade was stopped: {render.clean(report.stopped)}", bad=True)
    if not met:
        terminal.say(f"ctl: {minimum} had to be up (--min-up): mend the others and run it again", bad=True)
        return ExitStatus.UNREACHABLE
    return ExitStatus.FAILED if report.outdated else ExitStatus.OK


@app.command(
    "down",
    epilog="""\b
Examples:
  ctl down                     end all agents and the service; VMs stay
  ctl down -w h[0-31]          end some
  ctl down --vms --purge       remove the VMs, and leave nothing behind on the hosts""",
)
@selecting()
def down(
    *,
    context: typer.Context,
    selection: Selection = EVERYBODY,
    vms: Annotated[bool, typer.Option("--vms", help="Destroy the VMs first, with their disks.")] = False,
    purge: Annotated[
        bool,
        typer.Option("--purge", help="Remove all that Canopy put on the hosts; with VMs there, only beside --vms."),
    ] = False,
    as_json: Json = False,
    quiet: Quiet = False,
) -> None:
    """End agents; their hosts leave the fleet. The service ends with the last of them.

    VMs stay as they are unless --vms is given, and a later `ctl up` finds them again.
    """
    from controller.up import down as bring_down

    ctl = ctl_of(context)
    hosts = ctl.session().choose(selection)
    began = time.monotonic()
    with Live(ctl.terminal, lambda: f"ending agents, {time.monotonic() - began:.0f} s", quiet=quiet):
        report = bring_down(ctl.fleet, hosts, purge=purge, vms=vms)
    raise typer.Exit(_report_down(ctl.terminal, report, as_json=as_json, quiet=quiet))


def _report_down(terminal: Terminal, report: DownReport, *, as_json: bool, quiet: bool) -> int:
    """Say who is gone, and what is not. The exit code."""
    from controller.render_vms import vm_objects

    order = {name: place for place, name in enumerate(name for result in report.results for name in result.hosts)}
    bad = [
        f"{at.host}: {vm.name}: {vm.detail}" for at in report.vms for vm in at.results if vm.change is VmChange.FAILED
    ]
    if as_json:
        found = {
            "results": render.result_objects(report.results, order),
            "vms": vm_objects((answer.host, answer.results) for answer in report.vms),
            "still_running": report.left,
            "service_ended": report.service_ended,
        }
        terminal.text(render.json_text(found))
    else:
        gone = [name for result in report.results if result.ok for name in result.hosts]
        if gone:
            terminal.text(f"{render.label(gone)}: gone\n")
        if report.service_ended:
            terminal.text("the service has ended\n")
    for line in [*map(render.clean, bad), *render.failures(report.results, order)]:
        terminal.say(line, bad=True)
    if report.left:
        terminal.say(f"{render.label(report.left)}: still running", bad=True)
    said = "" if quiet else render.summary(report.results, order)
    if said:
        terminal.say(said, bad=True)
    status = exit_status(result.outcome for result in report.results)
    return status or (ExitStatus.FAILED if bad or report.left else ExitStatus.OK)
