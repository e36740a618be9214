"""A process with a VmWorker in it, told what to do by lines of JSON: an agent as far as VMs go.

    python vm_driver.py DIRECTORY URI

Each line of standard input is {"do": ..., ...}; each is answered by {"answer": ...}. In between come {"changed": ...}
lines with the states that are new.
"""

from __future__ import annotations

import asyncio
import json
import sys
from pathlib import Path
from typing import Any

import msgspec

from agent.vms import VmWorker
from protocol.vms import VmSpec


def say(**line: Any) -> None:
    print(msgspec.json.encode(line).decode(), flush=True)


async def do(worker: VmWorker, request: dict[str, Any]) -> Any:
    match request["do"]:
        case "create":
            specs = msgspec.convert(request["specs"], list[VmSpec])
            return await worker.create(request["deployment"], specs)
        case "destroy":
            return await worker.destroy(request["deployment"], request.get("names"))
        case "states":
            return await worker.states()
        case "reachable":
            return await worker.reachable(request["names"], request["deadline_s"])
        case unknown:
            raise ValueError(unknown)


async def main() -> None:
    worker = VmWorker(Path(sys.argv[1]), sys.argv[2], on_change=lambda states: say(changed=states))
    await worker.start()
    while line := await asyncio.to_thread(sys.stdin.readline):
        say(answer=await do(worker, json.loads(line)))
    await worker.close()


if __name__ == "__main__":
    asyncio.run(main())
