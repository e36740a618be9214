"""`ctl` as its user runs it: a process of its own, with its own fleets' directory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil

CTL = Path(sys.executable).with_name("ctl")
#: A console ends a moment after what was typed; on a machine that is busy with much else that can take its time.
CONSOLE_S = 120.0


class Ctl:
    """Runs `ctl` with fleets below `home`. End it with `close`, which also ends a service that is still there."""

    def __init__(self, home: Path) -> None:
        self.home = home
        self.environment = {key: value for key, value in os.environ.items() if not key.startswith("CANOPY_")}
        self.environment["CANOPY_HOME"] = str(home)

    def __call__(
        self, *arguments: str, status: int | None = 0, timeout_s: float = 240.0
    ) -> subprocess.CompletedProcess[str]:
        """Run it; it must end with `status`, where that is not None."""
        done = subprocess.run(
            [str(CTL), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        if status is not None and done.returncode != status:
            raise AssertionError(
                f"ctl {' '.join(arguments)} ended with {done.returncode}, not {status}\n"
                f"--- stdout\n{done.stdout}\n--- stderr\n{done.stderr}\n--- service log\n{self._log()}"
            )
        return done

    def start(self, *arguments: str) -> subprocess.Popen[str]:
        """Start it, and go on."""
        return subprocess.Popen(
            [str(CTL), *arguments],
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def json(self, command: str, *arguments: str) -> Any:
        """What a command prints with --json."""
        return json.loads(self(command, "--json", *arguments).stdout)

    def typed(self, vm: str, text: str) -> str:
        """What a VM's console shows after a line was typed there."""
        done = subprocess.run(
            [str(CTL), "console", vm, "--quiet", "--force"],
            input=f"\r{text}\r".encode(),
            capture_output=True,
            timeout=CONSOLE_S,
            check=True,
            env=self.environment,
        )
        return done.stdout.decode(errors="replace")

    def _log(self) -> str:
        logs = sorted(self.home.glob("*/service.log"))
        return "\n".join(log.read_text(errors="replace")[-2000:] for log in logs)

    def close(self) -> None:
        """End whatever of this home still runs: the service, and agents of a local fleet."""
        for process in psutil.process_iter(["cmdline"]):
            words = process.info["cmdline"] or []
            ours = "-m" in words and any(word.startswith(f"{self.home}/") for word in words)
            if ours and ("controller.service" in words or "agent" in words):
                with suppress(psutil.NoSuchProcess):
                    process.terminate()
                    process.wait(10)
