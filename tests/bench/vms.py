"""`make bench-vms`: 2,000 VMs on 64 agents of this machine, with libvirt's test driver, from spawn to destroy."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from pathlib import Path

from tests.net.test_vms_many import whole_life
from tests.net.vmfleet import vm_fleet


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(prog="make bench-vms", description=__doc__)
    parser.add_argument("--vms", type=int, default=2_000, help="how many VMs (default: 2000)")
    parser.add_argument("--hosts", type=int, default=64, help="on how many agents (default: 64)")
    arguments = parser.parse_args()
    # Short, since a socket's path has 108 bytes at most (unix(7)).
    with tempfile.TemporaryDirectory(prefix="vms-") as folder:
        home = Path(folder)
        kernel = home / "vmlinuz"
        kernel.write_bytes(b"kernel")
        names = [f"h{n}" for n in range(arguments.hosts)]
        with vm_fleet(home, names, fanout=32) as fleet:
            took = whole_life(fleet, arguments.vms, kernel)
    load = os.getloadavg()[0]
    print(f"{arguments.vms} VMs on {arguments.hosts} agents, {os.cpu_count()} cores, load {load:.0f}")
    for what, seconds in took.items():
        print(f"  {what}: {seconds:.2f} s")
    return 0


if __name__ == "__main__":
    sys.exit(main())
