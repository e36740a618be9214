"""SSH keys of the hosts and of the fleet, and the files with which the service node's ``ssh -F`` reaches the hosts."""

from __future__ import annotations

import subprocess
from dataclasses import dataclass
from ipaddress import IPv4Address
from pathlib import Path

from .model import SYSTEM_PATH, TestHostsError

# ssh-keygen takes some 5 ms; a few at a time keep both cores of a small machine busy.
_AT_ONCE = 8


@dataclass(frozen=True, kw_only=True)
class SshFiles:
    """What the service node holds: the fleet's private key, all host keys, and a configuration for ``ssh -F``."""

    key: Path
    known_hosts: Path
    config: Path


def files_in(directory: Path) -> SshFiles:
    return SshFiles(key=directory / "id_ed25519", known_hosts=directory / "known_hosts", config=directory / "config")


def make_keys(paths: list[Path]) -> None:
    """Make an Ed25519 key pair at each path (public half at path + ".pub"), without a passphrase."""
    waiting = list(paths)
    running: list[tuple[Path, subprocess.Popen[bytes]]] = []
    while waiting or running:
        while waiting and len(running) < _AT_ONCE:
            path = waiting.pop(0)
            command = ["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-C", "testhosts", "-f", str(path)]
            running.append((path, subprocess.Popen(command, env={"PATH": SYSTEM_PATH})))
        path, process = running.pop(0)
        if process.wait() != 0:
            raise TestHostsError(f"ssh-keygen made no key at {path}: look at its message above")


def public_half(path: Path) -> str:
    """The public key's line without its comment."""
    return " ".join(path.with_name(path.name + ".pub").read_text().split()[:2])


def write_files(
    files: SshFiles, hosts: dict[str, tuple[tuple[str, ...], IPv4Address, str]], *, user: str = "root"
) -> None:
    """Write known_hosts and the configuration for hosts: name -> (all names, address, public host key)."""
    known = [f"{','.join((*names, str(address)))} {key}\n" for names, address, key in hosts.values()]
    files.known_hosts.write_text("".join(known))
    blocks = [f"Host {' '.join(names)}\n    HostName {address}\n" for names, address, _ in hosts.values()]
    # The first value found for a keyword counts, ssh_config(5): what is for all hosts stands last.
    blocks.append(
        "Host *\n"
        f"    User {user}\n"
        f"    IdentityFile {files.key}\n"
        "    IdentitiesOnly yes\n"
        f"    UserKnownHostsFile {files.known_hosts}\n"
        "    GlobalKnownHostsFile /dev/null\n"
        "    StrictHostKeyChecking yes\n"
        "    UpdateHostKeys no\n"
    )
    files.config.write_text("\n".join(blocks))
