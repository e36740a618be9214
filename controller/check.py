"""What the facts that hosts tell of themselves mean: what is, what should be and why, and the next step. Pure.

`ctl doctor` judges one host from outside, over SSH, so that it works where no agent does (`doctor`); this judges all
hosts of the tree from within.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal, NamedTuple

import msgspec

from agent.tunables import TUNABLES
from controller.advice import AGENT_FILES, Advice, Size, advice, libvirt_files
from controller.api import Status
from controller.doctor import CLOCK_SLACK, INSTALL_LIBVIRT, LEAST_ROOM, START_LIBVIRT
from controller.render import clean, label
from controller.tables import mib
from protocol.checks import HostFacts, Room

#: An image and the disks of a few VMs take gigabytes; below 5 GiB that is said, and not held against the host.
_LITTLE_ROOM = 5 << 10
#: What an answer may take for the two clocks to be compared at all, in seconds.
_CLOCK_BLUR = 30.0
_MIB_OF_GIB = 1 << 10
FORWARD = "net.ipv4.ip_forward"
_TUNE = "`ctl tune` says what it would change, `ctl tune --apply` changes it"
_KVM_STEP = (
    "turn on virtualization in the firmware (nested, where the host is a VM), then modprobe kvm_intel or kvm_amd; "
    "until then its VMs run on emulation, many times slower"
)

State = Literal["ok", "bad", "unknown", "note"]


class Checked(msgspec.Struct, frozen=True, kw_only=True):
    """One thing that was looked at: what it is, what it should be and why (empty where there is but one good way), and
    what to do where it is bad. A `note` is neither good nor bad."""

    check: str
    state: State
    text: str
    should: str = ""
    why: str = ""
    step: str = ""


class Seen(NamedTuple):
    """A host's facts, and when they were asked for and had, in seconds since 1970 by the service node's clock."""

    facts: HostFacts
    asked: float
    had: float


def size_of(status: Status, *, more_vms: int = 0) -> Size:
    """How large a fleet is, with so many VMs more than there are, spread evenly."""
    on = Counter(vm.host for vm in status.vms)
    hosts = max(1, len(status.hosts))
    return Size(
        hosts=len(status.hosts),
        vms=len(status.vms) + more_vms,
        vms_on_one=max(on.values(), default=0) + math.ceil(more_vms / hosts),
    )


def judge_all(seen: Mapping[str, Seen], size: Size, *, forward: bool, routes: bool = False) -> dict[str, list[Checked]]:
    """What there is to say of each host, in the order in which one would mend it. With `forward` hosts are to be
    routers for VMs; `routes`: they are the gateway of a network of VMs."""
    usual = usual_mtu(each.facts.mtu for each in seen.values())
    return {name: judge(each, size, usual, forward=forward, routes=routes) for name, each in seen.items()}


def usual_mtu(mtus: Iterable[int | None]) -> int | None:
    """The MTU that most have; the largest of several that as many have."""
    counted = Counter(mtu for mtu in mtus if mtu is not None)
    return max(counted, key=lambda mtu: (counted[mtu], mtu)) if counted else None


def judge(seen: Seen, size: Size, mtu: int | None, *, forward: bool, routes: bool = False) -> list[Checked]:
    """What there is to say of one host of a fleet of this size, where most have this MTU."""
    facts = seen.facts
    return [
        _kvm(facts),
        *_libvirt(facts, size),
        _qemu(facts),
        *map(_room, facts.rooms),
        _mtu(facts, mtu),
        *_settings(facts, advice(size, forward=forward)),
        *([_no_router()] if routes and not forward and facts.settings.get(FORWARD) == 0 else []),
        _agent_files(facts),
        *_modules(facts),
        _clock(seen),
        _memory(facts),
    ]


def well(found: Iterable[Checked]) -> bool:
    """Whether all is known to be as it should be."""
    return all(each.state in ("ok", "note") for each in found)


def to_raise(facts: HostFacts, wanted: Mapping[str, Advice]) -> dict[str, tuple[int, int]]:
    """The settings that are too low, each with what it is and what it should be at least."""
    found = {}
    for key, advised in wanted.items():
        value = facts.settings.get(key)
        if value is not None and value < advised.least:
            found[key] = (value, advised.least)
    return found


# --- one thing each ---------------------------------------------------------------------------------------------------


def _ok(check: str, text: str) -> Checked:
    return Checked(check=check, state="ok", text=text)


def _kvm(facts: HostFacts) -> Checked:
    if facts.kvm is None:
        return Checked(check="kvm", state="unknown", text=facts.kvm_why)
    if facts.kvm:
        return _ok("kvm", facts.kvm_why)
    why = "found out by running a guest of five instructions"
    return Checked(check="kvm", state="bad", text=facts.kvm_why, should="it runs a guest", why=why, step=_KVM_STEP)


def _libvirt(facts: HostFacts, size: Size) -> list[Checked]:
    libvirt = facts.libvirt
    if libvirt.problem:
        step = INSTALL_LIBVIRT if libvirt.missing else START_LIBVIRT
        return [Checked(check="libvirt", state="bad", text=f"{libvirt.uri}: {libvirt.problem}", step=step)]
    found = [_ok("libvirt", f"{libvirt.uri} answers, version {libvirt.version or 'unknown'}")]
    if libvirt.stale:
        found.append(
            Checked(
                check="libvirt",
                state="bad",
                text=f"{libvirt.daemon} has not read its configuration since that was written",
                step=f"systemctl restart {libvirt.daemon}, or `ctl tune --apply --restart-libvirt`; VMs go on",
            )
        )
    least = libvirt_files(size)
    if libvirt.daemon and libvirt.files is None:
        text = f"how many files {libvirt.daemon} may have open can't be told: it does not run now"
        found.append(Checked(check="files", state="note", text=text))
    elif libvirt.files is not None and libvirt.files < least:
        found.append(
            Checked(
                check="files",
                state="bad",
                text=f"{libvirt.daemon} may have {libvirt.files} files open",
                should=f"at least {least}",
                why=f"for {size.vms_on_one} VMs on a host, each with its monitor, log and console (getrlimit(2))",
                step=f"systemctl edit {libvirt.daemon}, with LimitNOFILE={least} below [Service], and restart it",
            )
        )
    elif libvirt.files is not None:
        found.append(_ok("files", f"{libvirt.daemon} may have enough files open"))
    return found


def _qemu(facts: HostFacts) -> Checked:
    if facts.qemu is None:
        return Checked(check="qemu", state="bad", text=facts.qemu_why, step=INSTALL_LIBVIRT)
    return _ok("qemu", f"version {facts.qemu} ({facts.qemu_why})")


def _room(room: Room) -> Checked:
    if not room.inodes_left or room.free_mib < LEAST_ROOM:
        what = f"{mib(room.free_mib)} left" if room.inodes_left else "no inodes left"
        return Checked(
            check="disk",
            state="bad",
            text=f"{what} in {room.path}",
            should=f"at least {LEAST_ROOM} MiB",
            why="for the agent, its log and its previous version",
            step="make room there",
        )
    if room.free_mib < _LITTLE_ROOM:
        return Checked(check="disk", state="note", text=f"{mib(room.free_mib)} left in {room.path}: few images fit")
    # Hosts have no two figures alike: a power of two lets them agree.
    return _ok("disk", f"{1 << (room.free_mib // _MIB_OF_GIB).bit_length() - 1} GiB or more left in {room.path}")


def _mtu(facts: HostFacts, usual: int | None) -> Checked:
    if facts.mtu is None:
        return Checked(check="mtu", state="unknown", text="no interface has the address that the agent listens at")
    if facts.mtu == usual:
        return _ok("mtu", f"{facts.mtu} bytes")
    return Checked(
        check="mtu",
        state="bad",
        text=f"{facts.mtu} bytes on {facts.interface}",
        should=f"{usual}, as on most hosts of the fleet",
        why="a bridge or a VXLAN drops what is too large for the next one, without a word (RFC 7348, section 4.3)",
        step=f"ip link set {facts.interface} mtu {usual}, and the same in the host's network configuration",
    )


def _settings(facts: HostFacts, wanted: Mapping[str, Advice]) -> list[Checked]:
    found, absent = [], []
    low = to_raise(facts, wanted)
    for key, advised in wanted.items():
        tunable = TUNABLES[key]
        why = f"{advised.why}: {tunable.meaning}"
        if key not in facts.settings:
            if tunable.place == "sysctl":
                absent.append(key)
        elif (value := facts.settings[key]) is None:
            text = facts.unread.get(key, f"{key} can't be read")
            found.append(
                Checked(check="limits", state="unknown", text=text, should=f"at least {advised.least}", why=why)
            )
        elif key in low:
            should = f"at least {advised.least}"
            text = f"{key} is {value}"
            found.append(Checked(check="limits", state="bad", text=text, should=should, why=why, step=_TUNE))
        else:
            found.append(_ok("limits", f"{key} is {value}"))
    if absent:
        text = f"not this host's own, but of the machine that it is a part of: {', '.join(absent)}"
        found.append(Checked(check="limits", state="note", text=text))
    return found


def _no_router() -> Checked:
    """Whether a host is a router is for its people to say: it is so for every network that it has."""
    return Checked(
        check="limits",
        state="note",
        text=f"{FORWARD} is 0: VMs whose gateway this host is reach no further",
        step="`ctl tune --apply --forward` makes it a router, if that is wanted",
    )


def _agent_files(facts: HostFacts) -> Checked:
    if facts.agent_files >= AGENT_FILES:
        return _ok("files", "the agent may have enough files open")
    return Checked(
        check="files",
        state="bad",
        text=f"the agent may have {facts.agent_files} files open",
        should=f"at least {AGENT_FILES}",
        why="for a relay's children and the commands that it runs (getrlimit(2))",
        step=f"raise nofile for {facts.user} in /etc/security/limits.conf, then start the agent anew",
    )


_USES = {
    "bridge": "networks of VMs",
    "vxlan": "networks of VMs that span hosts",
    "tun": "the network cards of VMs",
    "vhost_net": "faster network cards of VMs",
}


def _modules(facts: HostFacts) -> list[Checked]:
    found = []
    for name, use in _USES.items():
        presence = facts.modules.get(name)
        needed = name != "vhost_net"
        if presence in ("loaded", "available"):
            found.append(_ok("modules", name if presence == "loaded" else f"{name}, loaded when it is needed"))
        elif presence is None:
            text = f"whether the kernel has {name}, for {use}, can't be told"
            found.append(Checked(check="modules", state="unknown" if needed else "note", text=text))
        else:
            text = f"the kernel has no {name}, for {use}"
            step = "install the distribution's full kernel" if needed else ""
            found.append(Checked(check="modules", state="bad" if needed else "note", text=text, step=step))
    return found


def _clock(seen: Seen) -> Checked:
    """The host's clock was read after it was asked and before it was heard: that is how well two can be compared."""
    at_most = seen.facts.arrived_ms / 1000 - seen.asked
    at_least = seen.facts.answered_ms / 1000 - seen.had
    should, why = f"within {CLOCK_SLACK:.0f} s", "VMs begin with their host's clock"
    step = "let chrony or ntpd keep it: apt-get install chrony"
    for off, way in ((at_least, "ahead of"), (-at_most, "behind")):
        if off > CLOCK_SLACK:
            text = f"{off:.0f} s or more {way} the service node's"
            return Checked(check="clock", state="bad", text=text, should=should, why=why, step=step)
    blur = max(CLOCK_SLACK, math.ceil(max(abs(at_most), abs(at_least))))
    if blur > _CLOCK_BLUR:
        text = "the answer took too long to tell how far off it is"
        return Checked(check="clock", state="unknown", text=text, should=should, why=why)
    return _ok("clock", f"within {blur:.0f} s of the service node's")


def _memory(facts: HostFacts) -> Checked:
    pages = "unknown huge pages" if facts.huge_pages is None else f"{facts.huge_pages or 'no'} huge pages set aside"
    ksm = {None: "no KSM in the kernel", True: "KSM on", False: "KSM off"}[facts.ksm]
    return Checked(check="memory", state="note", text=f"{pages}, {ksm}")


# --- many hosts -------------------------------------------------------------------------------------------------------


def folded(found: Mapping[str, Sequence[Checked]]) -> list[tuple[Checked, list[str]]]:
    """Hosts that agree, together: in the order of checks, what is bad before what is well."""
    order: dict[str, int] = {}
    groups: dict[Checked, list[str]] = {}
    for name, each in found.items():
        for one in each:
            order.setdefault(one.check, len(order))
            groups.setdefault(one, []).append(name)
    states: tuple[State, ...] = ("bad", "unknown", "note", "ok")
    return sorted(groups.items(), key=lambda group: (order[group[0].check], states.index(group[0].state)))


_SIGNS: dict[State, str] = {"ok": "OK", "bad": "BAD", "unknown": "??", "note": "--"}


def report(found: Mapping[str, Sequence[Checked]]) -> str:
    """What was found as people read it: a line for each thing on which hosts agree, below it what should be."""
    lines = []
    for one, hosts in folded(found):
        lines.append(f"{_SIGNS[one.state]:<4} {one.check:<8} {label(hosts)}: {clean(one.text)}")
        if one.should and one.state != "ok":
            lines.append(f"{'':<13} should be: {clean(one.should)}" + (f" ({clean(one.why)})" if one.why else ""))
        if one.step:
            lines.append(f"{'':<13} next: {clean(one.step)}")
    bad = [name for name, each in found.items() if not well(each)]
    if found:
        lines.append(f"{len(found) - len(bad)} of {len(found)} well" + (f", not so: {label(bad)}" if bad else ""))
    return "".join(f"{line}\n" for line in lines)
