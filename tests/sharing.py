"""How two processes share the tests (pytest-xdist): `pytest -n 2 --dist loadfile --no-loadscope-reorder`."""

from __future__ import annotations

from pathlib import Path

import pytest
from xdist.scheduler import LoadFileScheduling
from xdist.workermanage import WorkerController

#: These keep both cores busy, or hold agents to times: they run while the other process is at tests that take one core.
#: The last begins first.
_LAST = ("test_bootstrap.py", "test_up.py", "test_faults.py")


def put_in_order(items: list[pytest.Item]) -> None:
    """Put tests of many hosts behind all others, each file as it is."""
    places = {name: place for place, name in enumerate(_LAST, start=1)}
    items.sort(key=lambda item: places.get(Path(item.path).name, 0))


class FromBothEnds(LoadFileScheduling):  # type: ignore[misc]  # xdist has no types
    """The first process takes files from the end, where those with test hosts are, the other from the beginning.

    So there is mostly one that waits for hosts and one that computes, and neither is done long before the other. A file
    is never divided, since its tests share what a module makes.
    """

    def _assign_work_unit(self, node: WorkerController) -> None:
        if node.gateway.id == "gw0":
            self.workqueue.move_to_end(next(reversed(self.workqueue)), last=False)
        super()._assign_work_unit(node)
