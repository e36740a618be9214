"""A host's networks of VMs: made, told where VMs are, removed. Through iproute2, which every distribution has.

Only interfaces that carry this agent's alias are ever changed. A network is in the journal before its interfaces are
made, so that half of one is taken back at the next start.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from agent import netplan
from agent.journal import RemoveLink, Step, Undo
from agent.lanes import within
from agent.ledger import Ledger, Pages
from agent.netplan import Have
from protocol.nets import BRIDGE_PREFIX, Net, bridge_of, tunnel_of

#: 30,000 entries take iproute2 a second; the kernel's network lock may be held by others for some.
_SECONDS = 60.0


class NetError(Exception):
    """The networks can't be what they are to be; the text says why and what to do."""


class Nets:
    """The networks of one agent, which listens at `address`."""

    def __init__(self, directory: Path, address: str, pages: Pages | None = None) -> None:
        self._address = address
        # Aliases have no room for paths, and several agents may share a host.
        self._alias = "canopy:" + hashlib.sha256(os.fsencode(directory.absolute())).hexdigest()[:16]
        self._ledger = Ledger(directory / "journal-nets", self._undo, pages)
        self._lock = asyncio.Lock()

    async def repair(self) -> None:
        """Take back networks that were half made. Raises NetError."""
        async with self._lock:
            for name in self._ledger.names():
                left = await self._ledger.found(name, self._ledger.steps(name) or ()).take_back()
                if left:
                    raise NetError(f"the network {name} is half made, and that can't be taken back: {left}")

    async def bring_to(self, nets: Sequence[Net]) -> list[str]:
        """Make the host's networks these and no others; what was done, in words. Raises NetError."""
        wrong = netplan.problems(nets)
        if wrong:
            raise NetError("; ".join(wrong))
        await self.repair()
        done = []
        async with self._lock:
            links = await self._links()
            ours = {name for name, link in links.items() if link.get("ifalias") == self._alias}
            wanted = {each for net in nets for each in (bridge_of(net.name), tunnel_of(net.name))}
            for name in sorted(ours - wanted):
                await _batch("ip", [f"link del {name}"])
                if name.startswith(BRIDGE_PREFIX):
                    done.append(f"removed {name.removeprefix(BRIDGE_PREFIX)}")
            for net in nets:
                if await self._make(net, links):
                    done.append(f"made {net.name}")
                have = await self._have(net)
                lines, entries = netplan.joining(net, self._address, have)
                await _batch("ip", lines)
                await _batch("bridge", entries)
        return done

    async def _make(self, net: Net, links: dict[str, dict[str, Any]]) -> bool:
        pair = (tunnel_of(net.name), bridge_of(net.name))
        there = [links[name] for name in pair if name in links]
        for link in there:
            if link.get("ifalias") != self._alias:
                raise NetError(f"there is an interface {link['ifname']} already, which is not Canopy's; rename it")
        if len(there) == len(pair) and self._fits(net, links[pair[0]]):
            return False
        entry = self._ledger.begin(net.name)
        await entry.note(Step(does="make its interfaces", undo=tuple(RemoveLink(name=name) for name in pair)))
        try:
            await _batch("ip", [f"link del {link['ifname']}" for link in there])
            await _batch("ip", netplan.making(net, self._address, self._mtu(links), self._alias))
            await entry.end()
        except BaseException:
            await asyncio.shield(entry.take_back())
            raise
        return True

    def _fits(self, net: Net, tunnel: dict[str, Any]) -> bool:
        data = tunnel.get("linkinfo", {}).get("info_data", {})
        return bool(data.get("id") == net.vni and data.get("local") == self._address and tunnel.get("master"))

    def _mtu(self, links: dict[str, dict[str, Any]]) -> int:
        """That of the link which has the agent's address."""
        for link in links.values():
            if any(each.get("local") == self._address for each in link.get("addr_info", ())):
                return int(link["mtu"])
        raise NetError(
            f"this host has no interface with the address {self._address}, which others know it by; networks of VMs "
            "can't pass an address translation"
        )

    async def _undo(self, undo: Undo) -> None:
        if not isinstance(undo, RemoveLink):
            raise TypeError(f"the journal of a network can't {undo}")
        link = (await self._links()).get(undo.name)
        # One without the alias is somebody else's, or ours from the moment between its making and its naming.
        if link is not None and link.get("ifalias", self._alias) == self._alias:
            await _batch("ip", [f"link del {undo.name}"])

    async def _links(self) -> dict[str, dict[str, Any]]:
        return {link["ifname"]: link for link in await _ask("ip", "-details", "address", "show")}

    async def _have(self, net: Net) -> Have:
        tunnel, bridge = tunnel_of(net.name), bridge_of(net.name)
        remote: dict[str, str] = {}
        bridged = set()
        for entry in await _ask("bridge", "fdb", "show", "dev", tunnel):
            if "dst" in entry:
                remote[entry["mac"]] = entry["dst"]
            elif entry.get("state") == "static":
                bridged.add(entry["mac"])
        neighbours = {
            entry["dst"]: entry["lladdr"]
            for entry in await _ask("ip", "neigh", "show", "dev", bridge, "nud", "permanent")
            if "lladdr" in entry and ":" not in entry["dst"]
        }
        return Have(remote, frozenset(bridged), neighbours)


async def _ask(program: str, *arguments: str) -> list[dict[str, Any]]:
    text = await _run([program, "-json", *arguments], b"")
    found: list[dict[str, Any]] = json.loads(text) if text.strip() else []
    return found


async def _batch(program: str, lines: Iterable[str]) -> None:
    text = "".join(f"{line}\n" for line in lines)
    if text:
        await _run([program, "-batch", "-"], text.encode())


async def _run(argv: Sequence[str], given: bytes) -> bytes:
    pipe = asyncio.subprocess.PIPE
    try:
        child = await asyncio.create_subprocess_exec(*argv, stdin=pipe, stdout=pipe, stderr=pipe)
    except FileNotFoundError:
        raise NetError("networks need iproute2; install it with `apt-get install iproute2`") from None
    try:
        output, errors = await within(_SECONDS, child.communicate(given))
    except asyncio.TimeoutError:
        raise NetError(f"{argv[0]} did not end within {_SECONDS:g} s") from None
    finally:
        if child.returncode is None:
            child.kill()
            await child.wait()
    if child.returncode != 0:
        said = " ".join(errors.decode(errors="replace").split())
        raise NetError(
            f"{argv[0]} says: {said}; networks of VMs take root" if os.geteuid() else f"{argv[0]} says: {said}"
        )
    return output
