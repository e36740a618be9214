"""A VM's console through the tree, with real QEMU: what is typed and shown arrives in order and once."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from controller.session import VmAnswer
from controller.status import CtlError
from deploy.guest import build_guest
from protocol.outcomes import Cancelled, Outcome, Refused
from protocol.vms import VmChange
from tests.conftest import need_test_hosts
from tests.e2e.vm_host import BOOT_S, DEPLOYMENT, a_spec, add_image
from tests.net.localfleet import ROOT, LocalFleet, local_fleet
from tests.waiting import wait_until

pytestmark = pytest.mark.timeout(300)


class Seat:
    """Somebody in front of a console."""

    def __init__(self, fleet: LocalFleet, *, force: bool = False) -> None:
        self.end, self.host = fleet.session.console(DEPLOYMENT, "vm1", force=force)
        self.shown = bytearray()
        self.outcomes: list[Outcome] = []
        self._thread = threading.Thread(target=self._listen, daemon=True)
        self._thread.start()

    def _listen(self) -> None:
        try:
            folded = self.end.shown(self.shown.extend)
            self.outcomes = [fold.outcome for each in folded for fold in each.folds]
        except CtlError:
            pass

    def sees(self, text: bytes) -> None:
        wait_until(lambda: text in self.shown, BOOT_S, f"{text!r} on the console, not {bytes(self.shown[-500:])!r}")

    def leave(self) -> list[Outcome]:
        self.end.leave()
        self._thread.join(BOOT_S)
        return self.outcomes


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalFleet]:
    """Two hosts in a row, the lower one with a VM: what goes to and fro passes a relay."""
    need_test_hosts(libvirt=True)
    guest = build_guest()
    # libvirt's sockets below it must have short names.
    root = Path("/var/tmp") / f"canopy-console-{time.monotonic_ns()}"
    (root / "etc").mkdir(parents=True)
    # The machine's cgroups are also those of whoever tests beside.
    settings = 'stdio_handler = "file"\ncgroup_controllers = []\nuser = "root"\ngroup = "root"\n'
    (root / "etc" / "qemu.conf").write_text(settings)
    # With the agent its namespace ends, and the VM with it.
    caged = ["unshare", "--pid", "--fork", "--mount", "--mount-proc", "--kill-child", "tini", "-s", "--"]
    before = {"h1": [*caged, "env", f"CANOPY_LIBVIRT=qemu:///embed?root={root}"]}
    try:
        with local_fleet(tmp_path_factory.mktemp("home"), ["h0", "h1"], fanout=1, before=before) as made:
            images = made.directory("h1").path / "images"
            boot = (add_image(images, guest.kernel), add_image(images, guest.initrd))
            spec = a_spec("vm1", "198.18.0.5", boot, bridge=None)
            job = made.session.create_vms(DEPLOYMENT, {"h1": (spec,)})
            [answer] = [happening for happening in job if isinstance(happening, VmAnswer)]
            assert [result.change for result in answer.results] == [VmChange.CREATED], answer
            yield made
    finally:
        shutil.rmtree(root)


@pytest.fixture(scope="module")
def seat(fleet: LocalFleet) -> Iterator[Seat]:
    seat = Seat(fleet)
    seat.sees(b"ready at 198.18.0.5")
    yield seat
    assert seat.leave() == [Cancelled(ran=True)]


def test_a_command_that_is_typed_shows_its_output(seat: Seat) -> None:
    assert seat.host == "h1"
    assert seat.end.type(b"echo product-$((6*7))\r")
    seat.sees(b"product-42")


def test_much_output_comes_whole_and_in_order(seat: Seat) -> None:
    """Several windows of it: what was seen has to be told for more to come."""
    seat.end.type(b"seq -s , 1 20000; echo all-$((1+1))\r")
    seat.sees(b"all-2")
    assert ",".join(map(str, range(1, 20001))).encode() in bytes(seat.shown).replace(b"\r", b"").replace(b"\n", b"")


def test_a_second_seat_is_refused_and_can_take_the_console(fleet: LocalFleet, seat: Seat) -> None:
    other = Seat(fleet)
    wait_until(lambda: other.outcomes, BOOT_S, "the refusal")
    [refused] = other.outcomes
    assert isinstance(refused, Refused)
    assert "--force" in refused.why


def test_a_console_of_a_vm_that_is_not_on_record_is_refused(fleet: LocalFleet) -> None:
    with pytest.raises(CtlError, match="not on record"):
        fleet.session.console(DEPLOYMENT, "vm9")


def test_ctl_console_types_what_it_is_given(fleet: LocalFleet, seat: Seat, tmp_path: Path) -> None:
    seat.leave()
    ctl = subprocess.run(
        [sys.executable, "-m", "controller.cli", "--fleet", "net", "console", "vm1"],
        input=b"\recho sum-$((40+2))\r",
        capture_output=True,
        timeout=BOOT_S,
        check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert (ctl.returncode, b"sum-42" in ctl.stdout) == (0, True), (ctl.stdout, ctl.stderr)
    assert b"console of vm1 on h1" in ctl.stderr
