"""The process that a fleet of test hosts hangs on: it makes them, drives them, and takes them along when it ends.

It is started by ``TestHosts`` with a pipe each way, and speaks lines of JSON: one request, one answer. It ends when it
is told to, when its standard input closes, or when the process that started it dies. Whatever kills it, the
kernel kills the hosts (each has the supervisor's death as its own), and their namespaces, mounts and links go
with them. It lives in a network namespace (the segment's) and a mount namespace of its own. It has one thread,
since it forks.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import sys
import time
from dataclasses import asdict, dataclass
from ipaddress import IPv4Address, IPv4Interface
from pathlib import Path
from typing import Any

from . import boot, disk, network, processes, runs, ssh, syscalls
from .model import HostSpec, TestHostsError, all_names

# Hosts whose links are made by one call of ip(8), while those before them go on starting.
_BATCH = 16
# libvirtd probes QEMU as it starts; on a busy machine with many hosts that is what takes long.
_READY_SECONDS = 120.0
_LIBVIRT_READY_SECONDS = 600.0
# A host's processes stop within milliseconds, except one in an uninterruptible call.
_FREEZE_SECONDS = 10.0
_POLL_SECONDS = 0.01
# A killed process dies within milliseconds, except one in an uninterruptible call.
_DEATH_SECONDS = 30.0
_TCP_LISTEN = "0A"


@dataclass(kw_only=True)
class _Running:
    plan: boot.BootPlan
    index: int
    pid: int = 0
    frozen: tuple[int, ...] = ()
    cut: bool = False


def _listens_on_ssh(pid: int) -> bool:
    """Whether a socket listens on port 22 in the process's network namespace, from proc(5)'s net/tcp table."""
    for table in ("tcp", "tcp6"):
        try:
            lines = Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]
        except (FileNotFoundError, ProcessLookupError, OSError):
            continue
        for line in lines:
            fields = line.split()
            if fields[3] == _TCP_LISTEN and int(fields[1].rpartition(":")[2], 16) == 22:
                return True
    return False


class Supervisor:
    """A fleet's hosts by name, and the operations on them."""

    def __init__(self, specs: list[HostSpec], owner: int) -> None:
        names = all_names(specs)
        self.notes = network.raise_machine_limits()
        self._run, cleaned = runs.claim()
        if cleaned:
            self.notes.append(f"cleaned what dead runs left: {', '.join(map(str, cleaned))}")
        self._hosts: dict[str, _Running] = {}
        self._dying: set[int] = set()
        try:
            runs.describe(self._run, owner=owner, hosts=[spec.name for spec in specs])
            self._prepare(specs, names)
            self._start(list(self._hosts.values()))
        except BaseException:
            self.close()
            raise

    def _prepare(self, specs: list[HostSpec], names: dict[str, tuple[str, ...]]) -> None:
        directory, subnet = self._run.directory, self._run.subnet
        machine_namespace = os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)
        syscalls.unshare(syscalls.CLONE_NEWNS | syscalls.CLONE_NEWNET)
        syscalls.mount("none", "/", "", syscalls.MS_REC | syscalls.MS_PRIVATE)
        network.build_segment(machine_namespace, self._run.link, subnet)
        os.close(machine_namespace)

        for name in ("disks", "root", "ssh", "keys"):
            (directory / name).mkdir(mode=0o700)
        disks = directory / "disks"
        syscalls.mount("tmpfs", str(disks), "tmpfs", syscalls.MS_NODEV, "mode=700")
        files = ssh.files_in(directory / "ssh")
        host_keys = [directory / "keys" / str(index) for index in range(len(specs))]
        ssh.make_keys([files.key, *host_keys])

        addresses = [network.host_address(subnet, index) for index in range(len(specs))]
        lines = ["127.0.0.1 localhost", "::1 localhost ip6-localhost"]
        lines.append(f"{network.service_address(subnet)} service")
        lines.extend(f"{address} {' '.join(names[spec.name])}" for spec, address in zip(specs, addresses, strict=True))
        bare = disks / "bare"
        disk.make_bare_layer(
            bare, authorized_key=ssh.public_half(files.key), hosts_file="".join(line + "\n" for line in lines)
        )
        known: dict[str, tuple[tuple[str, ...], IPv4Address, str]] = {}
        for index, (spec, address) in enumerate(zip(specs, addresses, strict=True)):
            own = disks / str(index)
            disk.make_own_layer(own, spec, host_key=host_keys[index].read_bytes())
            known[spec.name] = (names[spec.name], address, ssh.public_half(host_keys[index]))
            plan = boot.BootPlan(
                spec=spec,
                address=IPv4Interface((address, subnet.prefixlen)),
                mac=network.mac_of(address),
                bare=bare,
                disk=own,
                root=directory / "root",
            )
            self._hosts[spec.name] = _Running(plan=plan, index=index)
        ssh.write_files(files, known)

    def _start(self, hosts: list[_Running]) -> None:
        for first in range(0, len(hosts), _BATCH):
            batch = hosts[first : first + _BATCH]
            booting = []
            for host in batch:
                started = boot.fork_host(host.plan)
                host.pid = started.pid
                booting.append(started)
            for started in booting:
                boot.wait_isolated(started)
            network.plug_in([(host.index, host.pid, host.plan.mac, host.plan.spec) for host in batch])
            for started in booting:
                boot.let_go(started)
            for started in booting:
                boot.wait_init(started)
        for host in hosts:
            self._wait_ready(host)

    def _wait_ready(self, host: _Running) -> None:
        spec = host.plan.spec
        needs_ssh = spec.mode not in ("hung", "refusing")
        deadline = time.monotonic() + (_LIBVIRT_READY_SECONDS if spec.libvirt else _READY_SECONDS)
        while True:
            if os.waitpid(host.pid, os.WNOHANG)[0]:
                host.pid = 0
                raise TestHostsError(f"{spec.name} went down as it started; its log says: {self._log(host)}")
            if not needs_ssh or _listens_on_ssh(host.pid):
                return
            if time.monotonic() > deadline:
                raise TestHostsError(f"{spec.name} has no sshd yet; its log says: {self._log(host)}")
            time.sleep(_POLL_SECONDS)

    def _log(self, host: _Running) -> str:
        try:
            return (host.plan.disk / "upper/var/log/testhost.log").read_text(errors="replace")[-2000:].strip()
        except FileNotFoundError:
            return "(nothing)"

    def facts(self) -> dict[str, Any]:
        """What the client needs to know of the fleet."""
        return {
            "directory": str(self._run.directory),
            "subnet": str(self._run.subnet),
            "link": self._run.link,
            "service_address": str(network.service_address(self._run.subnet)),
            "notes": self.notes,
            "hosts": {
                name: {
                    "address": str(host.plan.address.ip),
                    "mac": host.plan.mac,
                    "pid": host.pid,
                }
                for name, host in self._hosts.items()
            },
        }

    def handle(self, operation: str, name: str) -> dict[str, Any]:
        """Do one operation on one host; returns its pid afterwards, 0 where it is off."""
        host = self._hosts[name]
        if host.pid and self._ended_by_itself(host.pid):
            self._is_off(host)
        match operation:
            case "state":
                pass
            case "power_off":
                self._power_off(host)
            case "power_on":
                if host.pid:
                    raise TestHostsError(f"{name} is powered on already")
                self._start([host])
            case "freeze":
                self._freeze(self._powered(host))
            case "thaw":
                self._thaw(self._powered(host))
            case "cut" | "heal":
                network.set_link(self._powered(host).index, up=operation == "heal")
            case _:
                raise TestHostsError(f"there is no operation {operation!r}")
        return {"pid": host.pid}

    def _powered(self, host: _Running) -> _Running:
        if not host.pid:
            raise TestHostsError(f"{host.plan.spec.name} is powered off: power it on first")
        return host

    def _power_off(self, host: _Running) -> None:
        if host.pid:
            # The kernel kills all of a PID namespace with its init.
            os.kill(host.pid, signal.SIGKILL)
            self._dying.add(host.pid)
            self._wait_dead(host.pid)
            self._is_off(host)

    def _ended_by_itself(self, pid: int) -> bool:
        """Whether a host is down that nobody switched off: reboot(2) inside, or its sshd ended."""
        if os.waitpid(pid, os.WNOHANG)[0]:
            return True
        if not processes.is_over(pid):
            return False
        self._dying.add(pid)
        return True

    def _wait_dead(self, pid: int) -> None:
        deadline = time.monotonic() + _DEATH_SECONDS
        while not self._reap(pid) and not processes.is_over(pid):
            if time.monotonic() > deadline:
                raise TestHostsError(f"the host with init {pid} was killed {_DEATH_SECONDS:g} s ago and is not dead")
            time.sleep(_POLL_SECONDS / 10)

    def _reap(self, pid: int) -> bool:
        if pid in self._dying and os.waitpid(pid, os.WNOHANG)[0]:
            self._dying.discard(pid)
        return pid not in self._dying

    def _is_off(self, host: _Running) -> None:
        host.pid = 0
        host.frozen = ()
        network.remove_port(host.index)

    def _freeze(self, host: _Running) -> None:
        if host.frozen:
            return
        deadline = time.monotonic() + _FREEZE_SECONDS
        before: set[int] | None = None
        while True:
            # A process may fork before its signal arrives, so look again until a look finds none running.
            states = {pid: processes.is_stopped(pid) for pid in processes.in_pid_namespace(host.pid)}
            if before is None:
                before = {pid for pid, stopped in states.items() if stopped}
            running = [pid for pid, stopped in states.items() if stopped is False]
            if not running:
                host.frozen = tuple(pid for pid, stopped in states.items() if stopped and pid not in before)
                return
            for pid in running:
                _signal(pid, signal.SIGSTOP)
            if time.monotonic() > deadline:
                raise TestHostsError(f"{host.plan.spec.name}: processes {running} do not stop")
            time.sleep(_POLL_SECONDS / 10)

    def _thaw(self, host: _Running) -> None:
        for pid in host.frozen:
            _signal(pid, signal.SIGCONT)
        host.frozen = ()

    def close(self) -> None:
        """Power all hosts off and remove everything that the run made."""
        for host in self._hosts.values():
            if host.pid:
                _signal(host.pid, signal.SIGKILL)
                self._dying.add(host.pid)
                host.pid = 0
        for pid in list(self._dying):
            with contextlib.suppress(TestHostsError):
                self._wait_dead(pid)
        # Where the start failed early, there is neither.
        with contextlib.suppress(TestHostsError):
            network.ip(["link delete service"])
        with contextlib.suppress(OSError):
            syscalls.unmount_detached(str(self._run.directory / "disks"))
        runs.release(self._run)


def _signal(pid: int, number: signal.Signals) -> None:
    with contextlib.suppress(ProcessLookupError):
        os.kill(pid, number)


def _answer(value: dict[str, Any]) -> None:
    sys.stdout.write(json.dumps(value) + "\n")
    sys.stdout.flush()


def _serve(supervisor: Supervisor, owner: int) -> None:
    buffered = b""
    poll = select.poll()
    poll.register(0, select.POLLIN)
    poll.register(owner, select.POLLIN)
    while True:
        ready = [descriptor for descriptor, _ in poll.poll()]
        # The pipe may outlive its owner, in a child that inherited it.
        if owner in ready:
            return
        part = os.read(0, 65536)
        if not part:
            return
        buffered += part
        while b"\n" in buffered:
            line, _, buffered = buffered.partition(b"\n")
            request = json.loads(line)
            try:
                _answer(supervisor.handle(request["operation"], request["name"]))
            except (TestHostsError, OSError) as error:
                _answer({"error": str(error)})


def main() -> None:
    """Entry of ``python -m deploy.testhosts.supervisor``: standard input's first line holds the wishes."""
    owner_pid = os.getppid()
    owner = os.pidfd_open(owner_pid)
    pending = b""
    while b"\n" not in pending:
        part = os.read(0, 65536)
        if not part:
            return
        pending += part
    try:
        supervisor = Supervisor(_read_wishes(pending), owner_pid)
    except (TestHostsError, OSError) as error:
        _answer({"error": str(error)})
        sys.exit(1)
    try:
        _answer(supervisor.facts())
        _serve(supervisor, owner)
    except BrokenPipeError:
        pass
    finally:
        supervisor.close()


def _read_wishes(line: bytes) -> list[HostSpec]:
    return [HostSpec(**{**wish, "aliases": tuple(wish["aliases"])}) for wish in json.loads(line)]


def wishes(specs: list[HostSpec]) -> str:
    """The first line that ``main`` reads."""
    return json.dumps([asdict(spec) for spec in specs])


if __name__ == "__main__":
    main()
