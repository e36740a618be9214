"""A process with a VmWorker in it, told what to do by lines of JSON: an agent as far as VMs go.

    python vm_driver.py DIRECTORY URI [STEP [VICTIM]]

At STEP of its journal it is killed, as by `kill -9`: when the step is on disk and not yet done; at "end" when all is
done and the journal not yet struck out. With VICTIM every process of that name is, and the driver goes on.
Each line of standard input is {"do": ..., ...}; each is answered by {"answer": ...}. In between come {"changed": ...}
lines with the states that are new.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import msgspec

from agent import hypervisor
from agent.ledger import Pages
from agent.vms import VmWorker
from protocol.vms import Action, VmSpec


class DeadlyPages(Pages):
    """Pages on which this process is killed, or another one."""

    def __init__(self, step: str, victim: str) -> None:
        self._step = step
        self._victim = victim

    def append(self, path: Path, data: bytes, *, sync: bool) -> None:
        super().append(path, data, sync=sync)
        if f'"does":"{self._step}"'.encode() in data:
            self._kill()

    def strike(self, path: Path) -> None:
        if self._step == "end":
            self._kill()
        super().strike(path)

    def _kill(self) -> None:
        if not self._victim:
            os.kill(os.getpid(), signal.SIGKILL)
        # Whoever brings the victim back does so once this one has said what came of its end.
        hypervisor._PATIENCE_SECONDS = 0.5
        for entry in filter(str.isdecimal, os.listdir("/proc")):
            with contextlib.suppress(OSError):
                if Path("/proc", entry, "comm").read_text().strip() == self._victim:
                    os.kill(int(entry), signal.SIGKILL)


def say(**line: Any) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


async def ask(worker: VmWorker, question: Any) -> Any:
    return await worker._watch.hypervisor().call(question, 60.0)


async def do(worker: VmWorker, request: dict[str, Any]) -> Any:
    match request["do"]:
        case "create":
            specs = msgspec.convert(request["specs"], list[VmSpec])
            return await worker.create(request["deployment"], specs)
        case "destroy":
            return await worker.destroy(request["deployment"], request.get("names"))
        case "act":
            action = Action(request["action"])
            return await worker.act(
                request["deployment"], request["names"], action, hard=request.get("hard", False), label=request["label"]
            )
        case "define":  # as somebody else would
            return await ask(worker, lambda libvirt: libvirt.defineXML(request["document"]).name())
        case "domains":
            return await ask(worker, lambda libvirt: sorted(domain.name() for domain in libvirt.listAllDomains()))
        case "states":
            return await worker.states()
        case "reachable":
            return await worker.reachable(request["names"], request["deadline_s"])
        case unknown:
            raise ValueError(unknown)


async def main() -> None:
    step, victim = [*sys.argv[3:], "", ""][:2]
    worker = VmWorker(
        Path(sys.argv[1]),
        sys.argv[2],
        on_change=lambda states: say(changed=states),
        pages=DeadlyPages(step, victim) if step else None,
    )
    await worker.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(answer=await do(worker, json.loads(line)))
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main())
