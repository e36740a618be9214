"""Test hosts: N separate hosts on one Linux machine, for tests and the demo.

``with TestHosts([HostSpec("h1"), HostSpec("h2")]) as fleet:`` gives two hosts with an sshd each; see README.md.
"""

from .fleet import TestHosts
from .model import DEBIAN_PACKAGES, Host, HostSpec, Mode, TestHostsError, missing_requirements
from .processes import Process, descendants, ssh_clients

__all__ = [
    "DEBIAN_PACKAGES",
    "Host",
    "HostSpec",
    "Mode",
    "Process",
    "TestHosts",
    "TestHostsError",
    "descendants",
    "missing_requirements",
    "ssh_clients",
]
