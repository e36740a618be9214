"""TestHosts: a fleet of test hosts as tests see it."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import threading
from collections.abc import Mapping, Sequence
from dataclasses import replace
from ipaddress import IPv4Address, IPv4Network
from pathlib import Path
from types import MappingProxyType, TracebackType
from typing import Any, Self

from . import processes, ssh
from .model import SYSTEM_PATH, Host, HostSpec, TestHostsError, all_names, missing_requirements
from .supervisor import wishes

_PROJECT = Path(__file__).resolve().parents[2]
# Killing hosts and removing their layers takes some 10 ms each.
_CLOSE_SECONDS = 120.0

# What sshd gives a command: its own PATH (Debian's build), and no more of the caller's environment than this.
_HOST_ENVIRONMENT = {
    "PATH": SYSTEM_PATH,
    "HOME": "/root",
    "USER": "root",
    "LOGNAME": "root",
    "SHELL": "/bin/bash",
    "LANG": "C.UTF-8",
}


class TestHosts:
    """Hosts that live from ``with TestHosts([...]) as fleet`` to its end, or to the end of this process.

    ``hosts``: by name, each with its address and its init's pid. ``ssh_config``, ``key``, ``known_hosts``: files for
    ``ssh -F``, in a directory that only root reads. ``service_address``: this machine on the hosts' segment, which they
    call ``service``. ``subnet``: the segment's; its upper half, ``vm_subnet``, is left to VMs. ``notes``: what was
    changed on the machine (limits raised, dead runs cleaned), also written to standard error.

    Operations may be called from several threads; each takes its turn. All raise TestHostsError when they fail,
    and KeyError for a name that no host has. Short names and aliases will do everywhere but in ``hosts``.
    """

    # The name begins as pytest's test classes do.
    __test__ = False

    directory: Path
    subnet: IPv4Network
    vm_subnet: IPv4Network
    service_address: IPv4Address
    link: str
    notes: tuple[str, ...]

    def __init__(self, specs: Sequence[HostSpec | str]) -> None:
        self._specs = [HostSpec(spec) if isinstance(spec, str) else spec for spec in specs]
        if not self._specs:
            raise TestHostsError("a fleet has at least one host")
        self._full_names = {known: name for name, aliases in all_names(self._specs).items() for known in aliases}
        self._hosts: dict[str, Host] = {}
        self._lock = threading.RLock()
        self._supervisor: subprocess.Popen[str] | None = None

    def __enter__(self) -> Self:
        self.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def start(self) -> None:
        """Make the hosts; returns once each has what its mode promises (for "ok", an sshd that listens)."""
        if self._supervisor is not None:
            raise TestHostsError("this fleet runs already: close it first")
        missing = missing_requirements(libvirt=any(spec.libvirt for spec in self._specs))
        if missing:
            raise TestHostsError(missing)
        self._errors = tempfile.TemporaryFile(mode="w+")  # noqa: SIM115
        self._supervisor = subprocess.Popen(
            [sys.executable, "-S", "-m", "deploy.testhosts.supervisor"],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
            cwd="/",
            # Ctrl-C is for this process, which then ends the fleet in order.
            start_new_session=True,
            env={"PATH": SYSTEM_PATH, "PYTHONPATH": str(_PROJECT), "LANG": "C.UTF-8"},
        )
        try:
            facts = self._ask(wishes(self._specs))
        except BaseException:
            self.close()
            raise
        self.directory = Path(facts["directory"])
        self.subnet = IPv4Network(facts["subnet"])
        self.vm_subnet = list(self.subnet.subnets(prefixlen_diff=1))[1]
        self.link = facts["link"]
        self.service_address = IPv4Address(facts["service_address"])
        self.notes = tuple(facts["notes"])
        for note in self.notes:
            print(f"test hosts: {note}", file=sys.stderr)
        for spec in self._specs:
            known = facts["hosts"][spec.name]
            self._hosts[spec.name] = Host(
                name=spec.name,
                site=spec.site,
                mode=spec.mode,
                address=IPv4Address(known["address"]),
                mac=known["mac"],
                spec=spec,
                pid=known["pid"],
            )

    def close(self) -> None:
        """Power all hosts off and remove everything; returns when it is gone. May be called again."""
        with self._lock:
            supervisor, self._supervisor = self._supervisor, None
            if supervisor is None:
                return
            assert supervisor.stdin is not None
            assert supervisor.stdout is not None
            with contextlib.suppress(BrokenPipeError):
                supervisor.stdin.close()
            try:
                supervisor.wait(timeout=_CLOSE_SECONDS)
            except subprocess.TimeoutExpired:
                supervisor.kill()
                supervisor.wait()
            supervisor.stdout.close()
            self._errors.close()
            self._hosts.clear()

    def _ask(self, line: str) -> dict[str, Any]:
        with self._lock:
            supervisor = self._supervisor
            if supervisor is None or supervisor.stdin is None or supervisor.stdout is None:
                raise TestHostsError("this fleet has ended: make another")
            try:
                supervisor.stdin.write(line + "\n")
                supervisor.stdin.flush()
                answer = supervisor.stdout.readline()
            except BrokenPipeError:
                answer = ""
            if not answer:
                self._errors.seek(0)
                raise TestHostsError(f"the hosts' supervisor ended: {self._errors.read()[-4000:].strip()}")
            facts: dict[str, Any] = json.loads(answer)
        if "error" in facts:
            raise TestHostsError(facts["error"])
        return facts

    def _operate(self, operation: str, name: str) -> Host:
        with self._lock:
            host = self.host(name)
            facts = self._ask(json.dumps({"operation": operation, "name": host.name}))
            self._hosts[host.name] = replace(host, pid=facts["pid"])
            return self._hosts[host.name]

    @property
    def hosts(self) -> Mapping[str, Host]:
        """The hosts by full name, in the order in which they were asked for."""
        return MappingProxyType(self._hosts)

    def host(self, name: str) -> Host:
        """The host of a name, short name or alias."""
        return self._hosts[self._full_names[name]]

    @property
    def ssh_config(self) -> Path:
        return ssh.files_in(self.directory / "ssh").config

    @property
    def key(self) -> Path:
        return ssh.files_in(self.directory / "ssh").key

    @property
    def known_hosts(self) -> Path:
        return ssh.files_in(self.directory / "ssh").known_hosts

    @property
    def supervisor_pid(self) -> int:
        """The process that the hosts die with."""
        if self._supervisor is None:
            raise TestHostsError("this fleet has ended: make another")
        return self._supervisor.pid

    def power_off(self, name: str) -> None:
        """Kill the host's init and all with it: its connections end, and its link is gone. Its disk stays."""
        self._operate("power_off", name)

    def power_on(self, name: str) -> Host:
        """Start the host again on the disk that it had; returns once it is ready, with its new pid."""
        return self._operate("power_on", name)

    def is_on(self, name: str) -> bool:
        """Whether the host runs; it can also go down by itself (``reboot -f`` inside, or the end of its sshd)."""
        return self._operate("state", name).pid != 0

    def freeze(self, name: str) -> None:
        """Stop all processes of the host. Its kernel side lives: it answers ping and completes TCP handshakes."""
        self._operate("freeze", name)

    def thaw(self, name: str) -> None:
        """Let go on what ``freeze`` stopped."""
        self._operate("thaw", name)

    def cut(self, name: str) -> None:
        """Pull the host's cable: silence both ways, no connection is reset."""
        self._operate("cut", name)

    def heal(self, name: str) -> None:
        """Plug the cable back in."""
        self._operate("heal", name)

    def run(
        self,
        name: str,
        argv: Sequence[str],
        *,
        stdin: str = "",
        timeout_s: float = 60.0,
        check: bool = True,
    ) -> subprocess.CompletedProcess[str]:
        """Run a program in the host without SSH, as root, with the environment that sshd would give it.

        Raises subprocess.CalledProcessError for an exit code other than 0 unless ``check`` is False, and
        subprocess.TimeoutExpired after ``timeout_s`` seconds, when the program is killed.
        """
        return subprocess.run(
            [*self._enter(name), *argv],
            input=stdin,
            timeout=timeout_s,
            check=check,
            capture_output=True,
            text=True,
            env=_HOST_ENVIRONMENT,
        )

    def popen(self, name: str, argv: Sequence[str], **options: Any) -> subprocess.Popen[str]:
        """Like ``run``, without waiting; ``options`` are Popen's. Its ``kill`` kills the program in the host."""
        return subprocess.Popen([*self._enter(name), *argv], text=True, env=_HOST_ENVIRONMENT, **options)

    def _enter(self, name: str) -> list[str]:
        host = self.host(name)
        if not host.pid:
            raise TestHostsError(f"{name} is powered off: power it on first")
        target = f"--target={host.pid}"
        enter = ["nsenter", target, "-m", "-u", "-i", "-n", "-p", "--root", "--wd", "--"]
        # nsenter stays outside as the program's parent; killing it is to kill the program too.
        return [*enter, "setpriv", "--pdeathsig", "KILL", "--"]

    def ssh(
        self, name: str, *argv: str, timeout_s: float = 60.0, check: bool = True
    ) -> subprocess.CompletedProcess[str]:
        """Run a command on the host over SSH, as a user with ``ssh -F`` would; errors as for ``run``."""
        command = ["ssh", "-F", str(self.ssh_config), "-o", "BatchMode=yes", name, "--", *argv]
        return subprocess.run(
            command, stdin=subprocess.DEVNULL, timeout=timeout_s, check=check, capture_output=True, text=True
        )

    def processes(self, name: str) -> list[processes.Process]:
        """The host's processes by their pid inside; empty where it is off."""
        pid = self.host(name).pid
        return processes.of_host(pid) if pid else []

    def ssh_count(self, pid: int | None = None) -> int:
        """How many ``ssh`` clients below ``pid`` (this process by default) run on the service node now."""
        return len(processes.ssh_clients(os.getpid() if pid is None else pid))
