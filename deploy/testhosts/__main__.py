"""The command line: ``python -m deploy.testhosts up|list|clean``."""

from __future__ import annotations

import argparse
import signal
import sys
import threading
from typing import get_args

from . import runs
from .fleet import TestHosts
from .model import HostSpec, Mode, TestHostsError

_EPILOG = """\
examples:
  python -m deploy.testhosts up -n 64                       hosts h0 to h63; Ctrl-C ends them
  python -m deploy.testhosts up suno-3.sophia.grid5000.fr suno-6.sophia.grid5000.fr --libvirt --bridge br0
  python -m deploy.testhosts up -n 8 --hung h3 --refusing h5 --no-python h7
  ssh -F /run/canopy-testhosts/0/ssh/config h3 hostname     as "up" prints it

Each host has its own network, processes, files, name and sshd, over a copy-on-write view of this machine's
system. It needs root, and the Debian packages iproute2, openssh-server, openssh-client, tini and util-linux.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m deploy.testhosts",
        description="Make separate hosts on this one machine, each with an sshd, for trying Canopy out.",
        epilog=_EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True)
    up = commands.add_parser("up", help="make hosts, and keep them until Ctrl-C")
    up.add_argument("names", nargs="*", metavar="NAME", help="hosts' names, instead of -n and --prefix")
    up.add_argument("-n", "--count", type=int, default=3, help="how many hosts (default %(default)s)")
    up.add_argument("--prefix", default="h", help="their names are PREFIX0, PREFIX1, … (default %(default)s)")
    up.add_argument("--site", default="", help="a site that they are all at")
    up.add_argument("--libvirt", action="store_true", help="run libvirtd on each")
    up.add_argument("--bridge", metavar="NAME", help="a bridge on each that VMs can join, such as br0")
    up.add_argument("--rate", type=float, metavar="MBIT", help="link rate of each, in Mbit/s each way")
    for mode in get_args(Mode):
        if mode != "ok":
            option = f"--{mode.replace('_', '-')}"
            up.add_argument(option, metavar="NAME", nargs="+", default=[], help=f"these are {mode}")
    commands.add_parser("list", help="show the fleets of test hosts on this machine")
    commands.add_parser("clean", help="remove what killed runs left behind; live ones are not touched")
    return parser


def _specs(arguments: argparse.Namespace) -> list[HostSpec]:
    names = arguments.names or [f"{arguments.prefix}{index}" for index in range(arguments.count)]
    modes: dict[str, Mode] = {}
    for mode in get_args(Mode):
        for name in getattr(arguments, mode, []):
            if name not in names:
                raise TestHostsError(f"--{mode.replace('_', '-')} {name}: no host has that name")
            modes[name] = mode
    return [
        HostSpec(
            name,
            site=arguments.site,
            mode=modes.get(name, "ok"),
            rate_mbit=arguments.rate,
            libvirt=arguments.libvirt,
            vm_bridge=arguments.bridge,
        )
        for name in names
    ]


def _up(arguments: argparse.Namespace) -> None:
    ended = threading.Event()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda *_: ended.set())
    with TestHosts(_specs(arguments)) as fleet:
        first = next(iter(fleet.hosts))
        print(f"{len(fleet.hosts)} hosts are up on {fleet.subnet}; this machine is {fleet.service_address}.")
        print(f"Reach one:  ssh -F {fleet.ssh_config} {first}")
        print("End them with Ctrl-C.", flush=True)
        ended.wait()


def _list() -> None:
    for run in runs.summaries():
        state = f"kept by process {run.owner}" if run.alive else "dead: 'clean' removes it"
        print(f"{run.number}: {len(run.hosts)} hosts on {run.subnet}, {state}; {run.ssh_config}")


def main() -> int:
    """Returns the exit code: 0, or 1 with one sentence on standard error."""
    arguments = _parser().parse_args()
    try:
        match arguments.command:
            case "up":
                _up(arguments)
            case "list":
                _list()
            case _:
                for number in runs.clean():
                    print(f"cleaned run {number}")
    except (TestHostsError, PermissionError) as error:
        print(f"testhosts: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
