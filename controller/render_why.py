"""What is known of one host, as text. Pure."""

from __future__ import annotations

from typing import Any

import msgspec

from controller.api import HostKnown
from controller.render import clean
from controller.render_jobs import what_text, words
from controller.tables import age, count, mib

#: How much of an identity or key tells it from others.
_SHORT = 12


def why(host: HostKnown) -> str:
    """All that is known of a host: a line each for its link, plan, report, agent, address, VMs, and what was lost."""
    status = host.status
    site = f", site {status.site}" if status.site else ""
    lines = [f"{status.name} (rank {status.rank}{site}): {'in the tree' if status.up else 'not in the tree'}"]
    rows = [
        ("link", _link(host)),
        ("plan", _plan(host)),
        ("report", _report(host)),
        ("agent", _agent(host)),
        ("address", f"{status.address}, ports {host.control_port} (control) and {host.bulk_port} (bulk)"),
        ("key", f"{host.key}, as it was enrolled"),
        ("VMs", f"{count(host.vms, 'VM')} on record"),
        *[("lost", f"job {one.job} ({what_text(one.what)}), {age(one.ago_s)} ago: {one.why}") for one in host.lost],
    ]
    if not host.lost:
        rows.append(("lost", "no outcome of late"))
    lines += [f"  {name:<8} {clean(text)}" for name, text in rows]
    return "\n".join(lines) + "\n"


def known_object(host: HostKnown) -> dict[str, Any]:
    """The same for programs."""
    lost = [{**msgspec.to_builtins(one), "what": words(one.what)} for one in host.lost]
    return {**msgspec.to_builtins(host), "lost": lost}


def _link(host: HostKnown) -> str:
    status = host.status
    parent = host.below or "the service"
    numbers = f"incarnation {status.incarnation}, epoch {host.epoch}"
    if host.attached is None:
        last = "" if status.incarnation is None else f"; its incarnation was {status.incarnation} when last heard of"
        return f"{status.why or 'has not attached since the service began'}{last}"
    if not host.attached:
        return f"down for {age(status.since_s)}: {host.said or 'nobody said why'}; {parent} said so ({numbers})"
    if not status.up:
        told = f"below {parent} when last heard of, {age(status.since_s)} ago ({numbers})"
        return f"{told}; {parent} is not in the tree: `ctl why {parent}`"
    planned = status.planned_parent or "the service"
    where = "as planned" if status.parent == status.planned_parent else f"planned below {planned}"
    said = f": {status.why}" if status.why and status.parent != status.planned_parent else ""
    through = "" if host.below is None else f", through {parent}"
    return f"below {parent}, {where}{said}, for {age(status.since_s)}; its agent said so{through} ({numbers})"


def _plan(host: HostKnown) -> str:
    above = " > ".join(ancestor.name for ancestor in host.ancestors)
    if host.unacknowledged is None:
        known = f"acknowledged, up to version {host.plan_version}"
    else:
        known = f"not acknowledged from version {host.unacknowledged} on (now {host.plan_version}): it has an older one"
    return f"{known}; it attaches to the first of {above}"


def _report(host: HostKnown) -> str:
    health = host.status.health
    if health is None:
        return "none since the service began"
    note = f"; it notes: {health.note}" if health.note else ""
    vms = {None: "", True: "", False: "; libvirt did not answer it"}[health.vms_known]
    return (
        f"{age(host.status.health_age_s)} ago, from its agent: load {health.load1:.2f}, "
        f"{mib(health.memory_free_mib)} of memory and {mib(health.disk_free_mib)} of disk free{vms}{note}"
    )


def _agent(host: HostKnown) -> str:
    status, facts = host.status, host.status.facts
    version = "version unknown" if status.health is None else f"version {status.health.version}"
    parts = [version, f"bundle {status.digest[:_SHORT] or 'unknown'}", f"Python {facts.get('python', 'unknown')}"]
    if "machine" in facts:
        parts.append(f"{facts['machine']} with {facts.get('libc', 'libc')} {facts.get('libc_version', '')}".rstrip())
    if "uid" in facts:
        parts.append("root" if facts["uid"] == "0" else f"user {facts['uid']}")
    if "local" in facts:
        parts.append("on this machine")
    return ", ".join(parts)
