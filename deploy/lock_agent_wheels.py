"""Write controller/agent-wheels.lock: the wheels that an agent's bundle is made of, each with its SHA-256.

Run it to take newer versions: give the pins below their new versions, run it with a Python that has pip,
and commit what it writes. For every Python and machine that a host may have it asks for the wheel that
needs the oldest glibc, so that one bundle serves as many hosts as possible. The lines are those of
sha256sum, so `sha256sum -c` checks a folder of wheels.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

PINS = (
    "backports.zstd==1.8.0",
    "blake3==1.0.10",
    "cffi==2.1.1",
    "msgspec==0.22.0",
    "psutil==7.2.2",
    "pycdlib==1.22.0",
    "pynacl==1.6.2",
    "pyzmq==27.3.0",
)
PYTHONS = ("3.10", "3.11", "3.12", "3.13", "3.14")
WITHIN = {"backports.zstd==1.8.0": PYTHONS[:4]}  # what later Pythons have in their standard library
MACHINES = ("x86_64", "aarch64")
GLIBCS = (17, 26, 28, 34)  # manylinux2014, and the levels that the pinned packages ask for beyond it
LOCK = Path(__file__).resolve().parent.parent / "controller" / "agent-wheels.lock"


def fetch(pin: str, python: str, machine: str, into: Path) -> Path:
    """The wheel of `pin` for one kind of host that runs on the oldest glibc."""
    digits = python.replace(".", "")
    problem = ""
    for newest in GLIBCS:
        with tempfile.TemporaryDirectory(dir=into) as scratch:
            platforms = [f"manylinux_2_{minor}_{machine}" for minor in range(newest, 4, -1)]
            platforms += [f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]
            command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--only-binary=:all:"]
            command += ["--implementation", "cp", "--python-version", python]
            command += ["--abi", f"cp{digits}", "--abi", "abi3", "--abi", "none"]
            for platform in platforms:
                command += ["--platform", platform]
            done = subprocess.run([*command, "--dest", scratch, pin], capture_output=True, text=True, check=False)
            if done.returncode == 0:
                (wheel,) = Path(scratch).iterdir()
                return wheel.rename(into / wheel.name)
            problem = done.stderr.strip().splitlines()[-1]
    sys.exit(f"no wheel of {pin} for Python {python} on {machine}: {problem}")


def main() -> None:
    """Fetch all the wheels, and write the lock."""
    lines = set()
    with tempfile.TemporaryDirectory() as scratch:
        for pin in PINS:
            for machine in MACHINES:
                for python in WITHIN.get(pin, PYTHONS):
                    wheel = fetch(pin, python, machine, Path(scratch))
                    lines.add((wheel.name, hashlib.sha256(wheel.read_bytes()).hexdigest()))
    header = "# Written by deploy/lock_agent_wheels.py: the wheels of an agent's bundle.\n"
    LOCK.write_text(header + "".join(f"{digest}  {name}\n" for name, digest in sorted(lines)))


if __name__ == "__main__":
    main()
