"""The test hosts are what they say: apart from one another and from this machine, and gone at their end."""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import pytest

from deploy.testhosts import HostSpec, Process, TestHosts, TestHostsError, runs
from tests.conftest import MakeTestHosts, need_test_hosts
from tests.waiting import wait_until

# Generous: nothing here takes more than a second or two on an idle machine, and a failure is worth the wait.
DEADLINE_S = 30.0

DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>32</memory>
  <os><type arch='x86_64'>hvm</type></os>
  <devices>
    <interface type='bridge'><source bridge='br0'/></interface>
    <console type='pty'/>
  </devices>
</domain>
"""

# Makes a fleet in a process of its own, says what it made, and waits to be killed.
OWNER = """
import signal
from deploy.testhosts import TestHosts
from tests.net.test_testhosts import Traces
with TestHosts(["h1", "h2"]) as fleet:
    print(Traces.of(fleet).to_json(), flush=True)
    signal.pause()
"""

PROJECT = Path(__file__).resolve().parents[2]
# For processes that import this project from its checkout.
ENVIRONMENT = os.environ | {"PYTHONPATH": str(PROJECT)}


@dataclass(frozen=True)
class Traces:
    """What tells a fleet's remains from those of a later one that was given the same number."""

    supervisor: int
    processes: list[int]
    link_index: str
    key: str
    key_text: str

    @classmethod
    def of(cls, fleet: TestHosts) -> Traces:
        return cls(
            supervisor=fleet.supervisor_pid,
            processes=[process.outer_pid for name in fleet.hosts for process in fleet.processes(name)],
            link_index=Path("/sys/class/net", fleet.link, "ifindex").read_text(),
            key=str(fleet.key),
            key_text=fleet.key.read_text(),
        )

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    def left(self) -> list[str]:
        """What of the fleet is still there."""
        found = [f"process {pid}" for pid in (self.supervisor, *self.processes) if alive(pid)]
        if self._link_is_there():
            found.append(f"link {self.link_index.strip()}")
        if self.files_are_there():
            found.append(self.key)
        return found

    def files_are_there(self) -> bool:
        try:
            return Path(self.key).read_text() == self.key_text
        except FileNotFoundError:
            return False

    def _link_is_there(self) -> bool:
        for link in Path("/sys/class/net").iterdir():
            with contextlib.suppress(OSError):  # another run's link may go while it is read
                if (link / "ifindex").read_text() == self.link_index:
                    return True
        return False


@pytest.fixture(scope="module", autouse=True)
def _possible() -> None:
    need_test_hosts(libvirt=True)


@pytest.fixture(scope="module")
def fleet(testhosts_module: MakeTestHosts) -> TestHosts:
    """Two ordinary hosts; a test that breaks one puts it right again."""
    return testhosts_module(
        [
            HostSpec("suno-3.sophia.grid5000.fr", site="sophia", aliases=("left",)),
            HostSpec("suno-6.sophia.grid5000.fr", site="sophia", rate_mbit=16, aliases=("right",)),
        ]
    )


def alive(pid: int) -> bool:
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return False
    return stat.rpartition(")")[2].split()[0] not in "ZX"


def connect_error(fleet: TestHosts, name: str) -> str:
    """What ssh says of a host that it can't log into."""
    command = ["ssh", "-F", str(fleet.ssh_config), "-o", "ConnectTimeout=1", name, "true"]
    done = subprocess.run(command, check=False, capture_output=True, text=True, timeout=DEADLINE_S)
    assert done.returncode == 255
    return done.stderr


class Echo:
    """A login that stays: each line given to ``cat`` on the host comes back for as long as the two can talk."""

    def __init__(self, fleet: TestHosts, name: str) -> None:
        command = ["ssh", "-F", str(fleet.ssh_config), name, "cat"]
        self.process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, bufsize=0
        )

    def say(self, line: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(line + b"\n")

    def hear(self, deadline_s: float) -> bytes | None:
        """The next line; None where none comes within the deadline; empty when the connection ended."""
        assert self.process.stdout is not None
        ready, _, _ = select.select([self.process.stdout], [], [], deadline_s)
        return self.process.stdout.readline().strip() if ready else None

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


@pytest.fixture
def echo(fleet: TestHosts) -> Iterator[Echo]:
    login = Echo(fleet, "left")
    login.say(b"first")
    assert login.hear(DEADLINE_S) == b"first"
    yield login
    login.close()


def test_a_host_has_its_own_name_and_is_reached_by_all_that_it_is_called(fleet: TestHosts) -> None:
    for name in ("suno-3.sophia.grid5000.fr", "suno-3", "left"):
        assert fleet.ssh(name, "hostname").stdout == "suno-3.sophia.grid5000.fr\n"
    assert fleet.host("right").site == "sophia"
    addresses = fleet.run("left", ["getent", "hosts", "suno-6.sophia.grid5000.fr", "right", "service"]).stdout.split()
    assert addresses.count(str(fleet.host("right").address)) == 2
    assert str(fleet.service_address) in addresses


def test_a_host_sees_its_own_processes_alone(fleet: TestHosts) -> None:
    with fleet.popen("right", ["sleep", "1000"]) as sleeper:
        try:
            wait_until(lambda: "sleep" in _programs(fleet.processes("right")), DEADLINE_S, "the process on its host")
            assert "sleep" not in _programs(fleet.processes("left"))
            listed = fleet.run("left", ["ps", "-e", "-o", "pid,args"]).stdout
        finally:
            sleeper.kill()
    assert listed.splitlines()[1].split()[:2] == ["1", "tini"]
    assert "sleep 1000" not in listed
    assert "pytest" not in listed


def _programs(processes: list[Process]) -> set[str]:
    return {process.argv[0] for process in processes}


def test_a_file_written_on_a_host_is_there_alone(fleet: TestHosts) -> None:
    for path in ("/root/mark", "/tmp/mark-of-a-test-host", "/etc/mark-of-a-test-host", "/usr/bin/mark-of-a-test-host"):
        fleet.run("left", ["sh", "-c", f"echo here > {path}"])
        assert (fleet.host("left").root / path[1:]).read_text() == "here\n"
        assert not (fleet.host("right").root / path[1:]).exists()
        assert not Path(path).exists()


def test_a_host_has_a_data_disk_of_its_own_which_is_no_overlay(fleet: TestHosts) -> None:
    said = fleet.run("left", ["sh", "-c", "touch /srv/own; stat -f -c %T / /srv"]).stdout.split()
    assert (said[0], said[1] != "overlayfs") == ("overlayfs", True)
    assert os.listdir(fleet.host("right").root / "srv") == []
    assert not Path("/srv/own").exists()
    (fleet.host("left").root / "srv/own").unlink()


def test_a_host_is_bare(fleet: TestHosts) -> None:
    root = fleet.host("left").root
    assert set(os.listdir(root / "root")) <= {".ssh", "mark"}
    assert os.listdir(root / "root/.ssh") == ["authorized_keys"]
    for hidden in ("home", "opt", "srv", "var/tmp", "usr/local/bin"):
        assert os.listdir(root / hidden) == []
    assert not (root / "dev/kvm").exists()
    assert (root / "dev/net/tun").is_char_device()
    assert not (root / PROJECT.relative_to("/")).exists()
    assert not (root / fleet.key.relative_to("/")).exists()
    assert fleet.ssh("left", "command -v python3").stdout == "/usr/bin/python3\n"


def test_hosts_have_networks_of_their_own(fleet: TestHosts) -> None:
    listen = "import socket; s = socket.create_server(('', 4711)); print('listens', flush=True); s.accept()"
    python = ["/usr/bin/python3", "-c", listen]
    with (
        fleet.popen("left", python, stdout=subprocess.PIPE) as left,
        fleet.popen("right", python, stdout=subprocess.PIPE) as right,
    ):
        try:
            assert left.stdout is not None
            assert right.stdout is not None
            assert (left.stdout.readline(), right.stdout.readline()) == ("listens\n", "listens\n")
        finally:
            left.kill()
            right.kill()
    links = json.loads(fleet.run("left", ["ip", "-json", "link"]).stdout)
    assert [link["ifname"] for link in links] == ["lo", "eth0"]


def test_hosts_reach_one_another_with_a_forwarded_agent_and_no_key_of_their_own(fleet: TestHosts) -> None:
    started = subprocess.run(["ssh-agent", "-s"], check=True, capture_output=True, text=True).stdout
    words = dict(word.split("=") for word in started.replace(";", " ").split() if "=" in word)
    try:
        environment = os.environ | words
        subprocess.run(["ssh-add", "-q", str(fleet.key)], check=True, env=environment)
        onward = f"ssh -o StrictHostKeyChecking=no {fleet.host('right').address} hostname"
        command = ["ssh", "-A", "-F", str(fleet.ssh_config), "left", onward]
        done = subprocess.run(command, check=True, capture_output=True, text=True, env=environment)
    finally:
        os.kill(int(words["SSH_AGENT_PID"]), signal.SIGTERM)
    assert done.stdout == "suno-6.sophia.grid5000.fr\n"


def test_an_ssh_client_below_this_process_is_counted_once(fleet: TestHosts, echo: Echo) -> None:
    assert fleet.ssh_count() == 1
    assert fleet.ssh_count(echo.process.pid) == 0
    echo.close()
    assert fleet.ssh_count() == 0


def test_a_limited_link_carries_no_more_than_its_rate(fleet: TestHosts) -> None:
    sent = 2_000_000
    began = time.monotonic()
    assert len(fleet.ssh("right", f"head -c {sent} /dev/zero").stdout) == sent
    # 1 s at 16 Mbit/s, less the 128 KiB that may go at once; a busy machine only makes it longer.
    assert time.monotonic() - began > 0.9
    assert "tbf" in fleet.run("right", ["tc", "qdisc", "show", "dev", "eth0"]).stdout


def test_a_cut_link_is_silence_and_a_healed_one_goes_on(fleet: TestHosts, echo: Echo) -> None:
    fleet.cut("left")
    echo.say(b"second")
    assert "timed out" in connect_error(fleet, "left") or "No route" in connect_error(fleet, "left")
    assert echo.hear(0) is None
    assert echo.process.poll() is None
    fleet.heal("left")
    assert echo.hear(DEADLINE_S) == b"second"


def test_power_off_ends_the_connections_and_a_reboot_keeps_the_disk(fleet: TestHosts, echo: Echo) -> None:
    fleet.run("left", ["sh", "-c", "echo kept > /root/mark; echo kept > /srv/mark; touch /run/lost"])
    old = fleet.host("left").pid
    fleet.power_off("left")
    assert echo.hear(DEADLINE_S) == b""
    assert not alive(old)
    assert not fleet.is_on("left")
    assert fleet.processes("left") == []
    with pytest.raises(TestHostsError, match="powered off"):
        fleet.run("left", ["true"])
    fleet.power_on("left")
    said = fleet.ssh("left", "cat mark /srv/mark; rm /srv/mark; ls /run/lost 2>&1", check=False).stdout
    assert said.startswith("kept\nkept\nls: cannot access")


def test_a_host_that_reboots_itself_is_seen_to_be_off(fleet: TestHosts) -> None:
    fleet.run("left", ["reboot", "--force"], check=False)
    wait_until(lambda: not fleet.is_on("left"), DEADLINE_S, "the host to go down")
    fleet.power_on("left")
    assert fleet.ssh("left", "hostname").stdout == "suno-3.sophia.grid5000.fr\n"


def test_a_frozen_host_says_nothing_until_it_is_thawed(fleet: TestHosts, echo: Echo) -> None:
    fleet.freeze("left")
    assert all(_state(process) == "T" for process in fleet.processes("left"))
    echo.say(b"second")
    assert "timed out" in connect_error(fleet, "left")
    assert echo.hear(0) is None
    fleet.thaw("left")
    assert echo.hear(DEADLINE_S) == b"second"


def _state(process: Process) -> str:
    return Path(f"/proc/{process.outer_pid}/stat").read_text().rpartition(")")[2].split()[0]


def test_faulty_hosts_fail_each_in_its_own_way(testhosts: MakeTestHosts) -> None:
    fleet = testhosts(
        [
            HostSpec("hung", mode="hung"),
            HostSpec("refusing", mode="refusing"),
            HostSpec("snakeless", mode="no_python"),
            HostSpec("old", mode="old_python"),
        ]
    )
    assert "timed out during banner exchange" in connect_error(fleet, "hung")
    assert "Connection refused" in connect_error(fleet, "refusing")
    assert fleet.ssh("snakeless", "python3 --version", check=False).returncode == 127
    version = "import sys; print(sys.version_info[:2], sys.version_info >= (3, 10))"
    assert fleet.run("old", ["python3", "-c", version]).stdout == "(3, 8) False\n"


def test_more_hosts_than_one_batch_all_answer(testhosts: MakeTestHosts) -> None:
    fleet = testhosts([f"h{index}" for index in range(40)])
    assert [fleet.run(name, ["hostname"]).stdout.strip() for name in fleet.hosts] == list(fleet.hosts)
    assert fleet.ssh("h39", "hostname").stdout == "h39\n"


def test_fleets_live_beside_one_another(fleet: TestHosts, testhosts: MakeTestHosts) -> None:
    other = testhosts(["suno-3.sophia.grid5000.fr"])
    assert not other.subnet.overlaps(fleet.subnet)
    other.power_off("suno-3")
    assert fleet.ssh("suno-3", "hostname").stdout == "suno-3.sophia.grid5000.fr\n"


def test_nothing_is_left_of_a_fleet_that_ended() -> None:
    with TestHosts(["h1", "h2"]) as fleet:
        traces = Traces.of(fleet)
        assert len(traces.left()) == 1 + 2 * 2 + 2  # the supervisor, an init and an sshd each, the link, the files
    assert traces.left() == []
    assert fleet.hosts == {}


@contextlib.contextmanager
def _owner() -> Iterator[tuple[subprocess.Popen[str], Traces]]:
    command = [sys.executable, "-c", OWNER]
    pipes = subprocess.PIPE
    with subprocess.Popen(command, stdout=pipes, stderr=pipes, text=True, env=ENVIRONMENT) as owner:
        assert owner.stdout is not None
        assert owner.stderr is not None
        line = owner.stdout.readline()
        assert line, owner.stderr.read()
        yield owner, Traces(**json.loads(line))


def test_hosts_go_when_the_process_that_made_them_is_killed() -> None:
    with _owner() as (owner, traces):
        assert traces.left() != []
        owner.kill()
    wait_until(lambda: not traces.left(), DEADLINE_S, "the fleet to go with its owner")


def test_a_killed_run_is_cleaned_at_the_next_start_and_a_live_one_is_not_touched(
    fleet: TestHosts, testhosts: MakeTestHosts
) -> None:
    live = Traces.of(fleet)
    everything = live.left()
    with _owner() as (owner, traces):
        # Nobody is left to clean up: the supervisor first, then who would have told it to end.
        os.kill(traces.supervisor, signal.SIGKILL)
        owner.kill()
    wait_until(
        lambda: not any(alive(pid) for pid in traces.processes), DEADLINE_S, "the hosts to die with their supervisor"
    )

    successor = testhosts(["h1"])

    assert successor.ssh("h1", "hostname").stdout == "h1\n"
    assert traces.left() == []
    assert live.left() == everything
    assert fleet.ssh("left", "hostname").stdout == "suno-3.sophia.grid5000.fr\n"


def test_cleaning_tells_a_dead_run_from_a_live_one(
    fleet: TestHosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(runs, "RUNS", tmp_path)
    (tmp_path / "1000").mkdir()
    (tmp_path / "1001").mkdir()
    with (tmp_path / "1001" / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        assert [(run.number, run.alive) for run in runs.summaries()] == [(1000, False), (1001, True)]
        assert runs.clean() == [1000]
        assert sorted(path.name for path in tmp_path.iterdir()) == ["1001", "lock"]


def test_the_command_line_keeps_hosts_until_interrupted() -> None:
    command = [sys.executable, "-m", "deploy.testhosts"]
    up = subprocess.Popen(
        [*command, "up", "-n", "2", "--prefix", "node"], stdout=subprocess.PIPE, text=True, env=ENVIRONMENT
    )
    with up:
        assert up.stdout is not None
        assert up.stdout.readline().startswith("2 hosts are up")
        shown = up.stdout.readline().split()
        assert shown[:3] == ["Reach", "one:", "ssh"]
        done = subprocess.run([*shown[2:], "hostname"], check=True, capture_output=True, text=True)
        listed = subprocess.run([*command, "list"], check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
        up.send_signal(signal.SIGINT)
        assert up.wait(timeout=DEADLINE_S) == 0
    assert done.stdout == "node0\n"
    assert f"kept by process {up.pid}" in listed
    assert (
        f"kept by process {up.pid}"
        not in subprocess.run([*command, "list"], check=True, capture_output=True, text=True, env=ENVIRONMENT).stdout
    )


def test_vms_run_on_two_hosts_at_once_and_share_their_segment(testhosts: MakeTestHosts) -> None:
    names = ("hv1", "hv2")
    fleet = testhosts([HostSpec(name, libvirt=True, vm_bridge="br0") for name in names])
    for name in names:
        (fleet.host(name).root / "root/vm.xml").write_text(DOMAIN.format(name=f"vm-{name}"))
        fleet.run(name, ["virsh", "create", "/root/vm.xml"])
    for name in names:
        assert fleet.run(name, ["virsh", "list", "--name"]).stdout.split() == [f"vm-{name}"]
        assert "qemu-system-x86_64" in {Path(program).name for program in _programs(fleet.processes(name))}
        ports = json.loads(fleet.run(name, ["ip", "-json", "link", "show", "master", "br0"]).stdout)
        assert {"eth0", "vnet0"} <= {port["ifname"] for port in ports}

    first, second = (fleet.vm_subnet.network_address + offset for offset in (1, 2))
    for name, address in zip(names, (first, second), strict=True):
        _add_neighbour(fleet, name, f"{address}/{fleet.subnet.prefixlen}")
    fleet.run("hv1", ["ip", "netns", "exec", "vm", "ping", "-c", "1", "-W", "5", str(second)])
    ping = shutil.which("ping")
    assert ping is not None
    for address in (first, second):
        subprocess.run([ping, "-c", "1", "-W", "5", str(address)], check=True, capture_output=True)

    for name in names:
        fleet.run(name, ["virsh", "destroy", f"vm-{name}"])
        assert fleet.run(name, ["virsh", "list", "--name", "--all"]).stdout.split() == []
        assert not any("qemu-system" in program for program in _programs(fleet.processes(name)))


def _add_neighbour(fleet: TestHosts, name: str, address: str) -> None:
    """What a VM is to the bridge of its host: a link on it with an address of its own, in a namespace here."""
    commands = [
        "netns add vm",
        "link add tap9 type veth peer name eth0 netns vm",
        "link set tap9 master br0 up",
        f"-n vm address add {address} dev eth0",
        "-n vm link set eth0 up",
    ]
    for command in commands:
        fleet.run(name, ["ip", *command.split()])
