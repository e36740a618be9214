"""What a host's examination means: findings, each with the next step. Pure; `checkup` does the examining."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import msgspec

from controller.api import Ancestor, HostKnown
from controller.render import clean
from controller.tables import age, mib

#: Below this, in MiB, a bundle (4 packed, 25 unpacked, and the previous one beside it) and a log may not fit.
LEAST_ROOM = 100
#: Logging in takes up to a second or two, and the two clocks are read before and after it.
CLOCK_SLACK = 2.0
_SHORT = 12
INSTALL_LIBVIRT = "apt-get install python3-libvirt libvirt-daemon-system qemu-system"
START_LIBVIRT = "see that libvirtd runs and that this user may use it: systemctl status libvirtd"

State = Literal["ok", "bad", "note"]


class Finding(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at. A `note` is neither good nor bad. `step` is what to do about a bad one."""

    check: str
    state: State
    text: str
    step: str = ""


class Disk(msgspec.Struct, frozen=True, kw_only=True):
    """The room where the agent lives or would live; `place` is the nearest directory that exists."""

    place: str
    free_mib: int
    inodes_left: bool
    writable: bool


class Agent(msgspec.Struct, frozen=True, kw_only=True):
    """The agent on the host: bundles by identity, the public key of its identity file (hexadecimal)."""

    installed: str
    running: bool
    started: str
    log: str
    key: str


class Libvirt(msgspec.Struct, frozen=True, kw_only=True):
    """Whether libvirt can be used, and which version it is; `missing` is Python's binding for it."""

    uri: str
    missing: bool
    problem: str
    version: str = ""


class Probed(msgspec.Struct, frozen=True, kw_only=True):
    """What the probe found on the host (agent/probe.py). `reach` has each planned ancestor, and why it can't be
    reached."""

    python: tuple[int, int]
    executable: str
    machine: str
    libc: str
    libc_version: tuple[int, int]
    user: str
    directory: str
    disk: Disk
    agent: Agent
    reach: dict[str, str]
    libvirt: Libvirt
    time: float


class Examined(msgspec.Struct, frozen=True, kw_only=True):
    """All that was seen of a host.

    `known` is what the service knows, None for a stranger, with `stranger` saying why. `ssh` and `python` are why SSH
    and Python failed, empty where they did not. `port` is why the control port can't be reached from here. `offset` is
    how far the host's clock is ahead, in seconds. `key` is the one on record (hexadecimal). `bundle` is the identity of
    today's for such a host, empty with the reason in `no_bundle`. `down` are hosts that are not in the tree.
    """

    name: str
    known: HostKnown | None = None
    stranger: str = ""
    ssh: str = ""
    seconds: float = 0.0
    python: str = ""
    probed: Probed | None = None
    port: str = ""
    offset: float = 0.0
    key: str = ""
    bundle: str = ""
    no_bundle: str = ""
    down: tuple[str, ...] = ()


def findings(seen: Examined) -> list[Finding]:
    """What was seen, in the order in which one would mend it."""
    found = [_tree(seen), *_ssh(seen)]
    if seen.probed is not None:
        found += [_disk(seen, seen.probed), _agent(seen, seen.probed)]
    if seen.known is not None:
        found.append(_port(seen, seen.known))
    if seen.probed is not None:
        found += [
            *_parents(seen, seen.probed),
            *_key(seen, seen.probed),
            _clock(seen),
            _libvirt(seen, seen.probed),
            *_version(seen, seen.probed),
        ]
    return found


def well(found: Sequence[Finding]) -> bool:
    """Whether nothing is bad."""
    return all(finding.state != "bad" for finding in found)


def _finding(check: str, text: str, step: str = "", *, bad: bool = True) -> Finding:
    return Finding(check=check, state="bad" if bad else "ok", text=text, step=step if bad else "")


def _local(seen: Examined) -> bool:
    return seen.known is not None and "local" in seen.known.status.facts


def _up(seen: Examined, what: str) -> str:
    return f"`ctl up --local` {what}" if _local(seen) else f"`ctl up -w {seen.name}` {what}"


def _tree(seen: Examined) -> Finding:
    if seen.known is None:
        return _finding("tree", seen.stranger or "not in this fleet", _up(seen, "takes it in"))
    status = seen.known.status
    if not status.up:
        step = f"mend what is bad below, then {_up(seen, 'starts it')}; `ctl why {seen.name}` has more"
        return _finding("tree", f"not in the tree: {status.why or 'nobody knows why'}", step)
    where = f"in the tree below {status.parent or 'the service'} for {age(status.since_s)}"
    if status.parent != status.planned_parent:
        where += f", planned below {status.planned_parent or 'the service'}: {status.why or 'it will be asked to move'}"
    return _finding("tree", where, bad=False)


def _ssh(seen: Examined) -> list[Finding]:
    if seen.ssh:
        return [_finding("ssh", seen.ssh, f"see that `ssh {seen.name} true` works without a question")]
    if seen.python:
        return [
            _finding("ssh", "logs in", bad=False),
            _finding("python", seen.python, "install one: apt-get install python3"),
        ]
    if seen.probed is None:
        return []
    version = ".".join(map(str, seen.probed.python))
    login = f"logs in as {seen.probed.user}, {seen.seconds:.1f} s with the probe"
    return [
        _finding("ssh", "not needed: this machine" if _local(seen) else login, bad=False),
        _finding("python", f"Python {version} ({seen.probed.executable})", bad=False),
    ]


def _disk(seen: Examined, probed: Probed) -> Finding:
    disk = probed.disk
    if not disk.writable:
        step = f"let {probed.user} write there, or log in as another user with -l"
        return _finding("disk", f"{disk.place} can't be written by {probed.user}", step)
    if disk.free_mib < LEAST_ROOM or not disk.inodes_left:
        what = f"{mib(disk.free_mib)} left" if disk.free_mib < LEAST_ROOM else "no inodes left"
        return _finding("disk", f"{what} in {disk.place}", f"make room there: an agent takes {LEAST_ROOM} MiB")
    return _finding("disk", f"{mib(disk.free_mib)} free in {disk.place}", bad=False)


def _agent(seen: Examined, probed: Probed) -> Finding:
    agent = probed.agent
    if agent.running:
        return _finding("agent", f"runs in {probed.directory}", bad=False)
    if not agent.installed and not _local(seen):
        return _finding("agent", "is not installed", _up(seen, "installs and starts it"))
    ends = f"; its log ends: {agent.log}" if agent.log else ""
    return _finding("agent", f"is installed and does not run{ends}", _up(seen, "starts it"))


def _port(seen: Examined, known: HostKnown) -> Finding:
    where = f"{known.control_port} of {known.status.address}"
    if not seen.port:
        return _finding("port", f"{where} takes connections from here", bad=False)
    if seen.probed is not None and not seen.probed.agent.running:
        return _finding("port", f"{where}: {seen.port}, for no agent runs", _up(seen, "starts it"))
    step = f"let TCP to that port through between hosts; if its address has changed, {_up(seen, 'enrols it anew')}"
    return _finding("port", f"{where} can't be reached from here: {seen.port}", step)


def _parents(seen: Examined, probed: Probed) -> list[Finding]:
    found = []
    for name, problem in probed.reach.items():
        who = "the service" if name == "service" else name
        at = next((f" ({a.address}:{a.control_port})" for a in _ancestors(seen) if a.name == name), "")
        if not problem:
            found.append(_finding("parent", f"it reaches {who}{at}", bad=False))
        elif name in seen.down:
            text = f"it does not reach {who}{at}, which is not in the tree: {problem}"
            found.append(Finding(check="parent", state="note", text=text))
        else:
            step = "let TCP to that port through between hosts"
            if name == "service":
                step += ", or tell hosts another address of this machine with `ctl up --address`"
            found.append(_finding("parent", f"it does not reach {who}{at}: {problem}", step))
    return found


def _ancestors(seen: Examined) -> Sequence[Ancestor]:
    return () if seen.known is None else seen.known.ancestors


def _key(seen: Examined, probed: Probed) -> list[Finding]:
    if seen.known is None:
        return []
    if probed.agent.key == seen.key:
        return [_finding("key", "the host's key is the one on record", bad=False)]
    # What is in the tree and up to date is not visited by `ctl up`.
    step = _up(seen, "enrols it anew")
    if seen.known.status.up:
        step = f"`ctl down -w {seen.name}`, then {step}"
    what = "the host's key is another than the one on record" if probed.agent.key else "the host has no key"
    return [_finding("key", what, step)]


def _clock(seen: Examined) -> Finding:
    if abs(seen.offset) <= CLOCK_SLACK:
        return _finding("clock", f"within {CLOCK_SLACK:.0f} s of this machine's", bad=False)
    way = "ahead of" if seen.offset > 0 else "behind"
    text = f"{age(abs(seen.offset))} {way} this machine's; harmless, since agents go by the service's"
    return Finding(check="clock", state="note", text=text)


def _libvirt(seen: Examined, probed: Probed) -> Finding:
    libvirt = probed.libvirt
    if not libvirt.problem and libvirt.uri.startswith("qemu:///embed"):
        return _finding("libvirt", "can be imported; the agent's private hypervisor is left to the agent", bad=False)
    if not libvirt.problem:
        return _finding("libvirt", f"{libvirt.uri} answers, version {libvirt.version or 'unknown'}", bad=False)
    if not libvirt.missing:
        return _finding("libvirt", f"{libvirt.uri}: {libvirt.problem}", START_LIBVIRT)
    step = INSTALL_LIBVIRT
    if seen.known is not None and seen.known.vms:
        return _finding("libvirt", f"there are VMs on record here, and {libvirt.problem}", step)
    text = f"no VMs can run here: {libvirt.problem}; if some should: {step}"
    return Finding(check="libvirt", state="note", text=text)


def _version(seen: Examined, probed: Probed) -> list[Finding]:
    if not probed.agent.installed:
        return []
    if not seen.bundle:
        return [
            _finding("version", f"no agent can be made for it: {seen.no_bundle}", "use a host that the agent runs on")
        ]
    runs = probed.agent.started or probed.agent.installed
    if runs == seen.bundle:
        return [_finding("version", f"bundle {runs[:_SHORT]}, which is today's", bad=False)]
    text = f"bundle {runs[:_SHORT]}, and today's is {seen.bundle[:_SHORT]}"
    return [_finding("version", text, _up(seen, "replaces it"))]


_SIGNS = {"ok": "OK", "bad": "BAD", "note": "--"}


def report(name: str, found: Sequence[Finding]) -> str:
    """The findings as people read them: the host, then a line each, and below a bad one what to do."""
    lines = [f"{name}: {'all well' if well(found) else 'not well'}"]
    for finding in found:
        lines.append(f"  {_SIGNS[finding.state]:<4} {finding.check:<8} {clean(finding.text)}")
        if finding.step:
            lines.append(f"  {'':<4} {'':<8} next: {clean(finding.step)}")
    return "\n".join(lines) + "\n"
