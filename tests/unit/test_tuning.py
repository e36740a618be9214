"""A host's settings are raised, kept for the next boot and put back, whatever ends in between. Below a root of its own,
never this machine's."""

from __future__ import annotations

import os
import signal
import stat
from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

from agent.libvirtd import Daemon, find_daemon
from agent.tunables import TUNABLES
from agent.tuning import TuneError, Tuner, Unfit

NEIGHBOURS = "net.ipv4.neigh.default.gc_thresh1"
INSTANCES = "fs.inotify.max_user_instances"
FORWARD = "net.ipv4.ip_forward"
CLIENTS = "libvirt.max_clients"
REQUESTS = "libvirt.max_client_requests"
WANTED = {NEIGHBOURS: 4096, INSTANCES: 512, CLIENTS: 64, REQUESTS: 8}
CONF = b"# libvirt's own words\nmax_clients = 20\n#max_client_requests = 5\n"


class Host:
    """The part of a host's files that is tuned."""

    def __init__(self, path: Path) -> None:
        self.root = path / "root"
        self.directory = path / "agent"
        self.directory.mkdir()
        self.sysctl_d = self.root / "etc" / "sysctl.d"
        self.conf = self.root / "etc" / "libvirt" / "libvirtd.conf"
        for key, value in ((NEIGHBOURS, 128), (INSTANCES, 128), (FORWARD, 0)):
            self.write(key, value)
        self.sysctl_d.mkdir(parents=True)
        self.conf.parent.mkdir()
        self.conf.write_bytes(CONF)
        self.conf.chmod(0o640)

    def sysctl(self, key: str) -> Path:
        return self.root.joinpath("proc", "sys", *key.split("."))

    def write(self, key: str, value: object) -> None:
        self.sysctl(key).parent.mkdir(parents=True, exist_ok=True)
        self.sysctl(key).write_text(f"{value}\n")

    def value(self, key: str) -> int:
        return int(self.sysctl(key).read_text())

    def tuner(self, step: Callable[[str], None] = lambda _: None) -> Tuner:
        return Tuner(self.directory, root=self.root, step=step)

    def files(self) -> dict[str, tuple[bytes, int]]:
        """Every file of the host and of the agent, with its mode."""
        return {
            str(path.relative_to(self.root.parent)): (path.read_bytes(), stat.S_IMODE(path.stat().st_mode))
            for path in sorted(self.root.parent.rglob("*"))
            if path.is_file()
        }

    def persisted(self) -> str:
        (file,) = self.sysctl_d.iterdir()
        return file.read_text()


@pytest.fixture
def host(tmp_path: Path) -> Host:
    return Host(tmp_path)


# --- raising ----------------------------------------------------------------------------------------------------------


def test_settings_are_raised_now_and_for_the_next_boot(host: Host) -> None:
    answer = host.tuner().apply(WANTED)
    assert {one.key: (one.before, one.after) for one in answer.tuned} == {
        NEIGHBOURS: (128, 4096),
        INSTANCES: (128, 512),
        CLIENTS: (20, 64),
        REQUESTS: (5, 8),
    }
    assert (host.value(NEIGHBOURS), host.value(INSTANCES), host.value(FORWARD)) == (4096, 512, 0)
    assert host.persisted().splitlines()[1:] == [f"{NEIGHBOURS} = 4096", f"{INSTANCES} = 512"]
    assert host.conf.read_bytes().endswith(CONF)
    assert host.conf.read_bytes().splitlines()[1:3] == [b"max_clients = 64", b"max_client_requests = 8"]
    assert host.tuner().read()[0] == {**WANTED, FORWARD: 0}


def test_nothing_is_ever_lowered(host: Host) -> None:
    host.write(NEIGHBOURS, 8192)
    before = host.files()
    answer = host.tuner().apply({NEIGHBOURS: 4096, INSTANCES: 128, CLIENTS: 20})
    assert all(one.before == one.after for one in answer.tuned)
    assert host.files() == before


def test_what_is_not_there_is_said_and_holds_up_nothing(host: Host) -> None:
    host.sysctl(NEIGHBOURS).unlink()
    answer = host.tuner().apply({NEIGHBOURS: 4096, INSTANCES: 512})
    assert [(one.key, one.after, bool(one.note)) for one in answer.tuned] == [
        (NEIGHBOURS, None, True),
        (INSTANCES, 512, False),
    ]
    assert NEIGHBOURS not in host.tuner().read()[0]


def test_what_cannot_be_read_is_unknown_with_the_reason(host: Host) -> None:
    host.write(NEIGHBOURS, "many")
    values, why = host.tuner().read()
    assert values[NEIGHBOURS] is None
    assert why == {NEIGHBOURS: f"{NEIGHBOURS} is no number"}
    with pytest.raises(TuneError, match="is no number"):
        host.tuner().apply({INSTANCES: 512, NEIGHBOURS: 4096})
    assert host.value(INSTANCES) == 128


def test_the_mode_and_owner_of_libvirts_configuration_stay(host: Host) -> None:
    if os.geteuid() == 0:
        os.chown(host.conf, 12, 34)
    before = host.conf.stat()
    host.tuner().apply({CLIENTS: 64})
    after = host.conf.stat()
    assert (after.st_mode, after.st_uid, after.st_gid) == (before.st_mode, before.st_uid, before.st_gid)


def test_a_host_without_libvirt_has_none_of_its_settings(host: Host) -> None:
    host.conf.unlink()
    assert set(host.tuner().read()[0]) == {NEIGHBOURS, INSTANCES, FORWARD}
    assert [one.after for one in host.tuner().apply({CLIENTS: 64}).tuned] == [None]
    assert not host.conf.exists()


def test_of_split_daemons_it_is_virtqemud_that_is_tuned(host: Host) -> None:
    sockets = host.root / "run" / "libvirt"
    sockets.mkdir(parents=True)
    (sockets / "virtqemud-sock").touch()
    (sockets / "libvirt-sock").touch()
    before = host.files()
    host.tuner().apply({REQUESTS: 8})
    assert b"max_client_requests = 8\n" in (host.conf.parent / "virtqemud.conf").read_bytes()
    host.tuner().undo()
    assert host.files() == before


# --- putting back -----------------------------------------------------------------------------------------------------


def test_undo_puts_back_exactly_what_was_there(host: Host) -> None:
    before = host.files()
    host.tuner().apply(WANTED)
    assert host.tuner().in_use
    answer = host.tuner().undo()
    assert {one.key: (one.before, one.after) for one in answer.tuned} == {
        NEIGHBOURS: (4096, 128),
        INSTANCES: (512, 128),
        CLIENTS: (64, 20),
        REQUESTS: (8, 5),
    }
    assert host.files() == before
    assert host.tuner().undo().tuned == ()


def test_undo_goes_back_to_before_the_first_of_several_changes(host: Host) -> None:
    before = host.files()
    host.tuner().apply(WANTED)
    host.tuner().apply({NEIGHBOURS: 8192, FORWARD: 1})
    assert (host.value(NEIGHBOURS), host.value(FORWARD)) == (8192, 1)
    assert f"{INSTANCES} = 512" in host.persisted()
    host.tuner().undo()
    assert host.files() == before


def test_what_somebody_else_has_changed_since_stays(host: Host) -> None:
    host.tuner().apply(WANTED)
    host.write(NEIGHBOURS, 65_536)
    host.conf.write_bytes(host.conf.read_bytes() + b"log_level = 2\n")
    answer = host.tuner().undo()
    assert [(one.key, one.after) for one in answer.tuned if one.note] == [(NEIGHBOURS, 65_536)]
    assert (host.value(NEIGHBOURS), host.value(INSTANCES)) == (65_536, 128)
    assert host.conf.read_bytes() == CONF + b"log_level = 2\n"


def test_two_agents_of_one_host_do_not_take_away_each_others(host: Host, tmp_path: Path) -> None:
    before = host.files()
    other = tmp_path / "other"
    other.mkdir()
    host.tuner().apply({INSTANCES: 512, CLIENTS: 64})
    Tuner(other, root=host.root).apply({INSTANCES: 1024, CLIENTS: 128})
    host.tuner().undo()
    assert Tuner(other, root=host.root).read()[0] | {INSTANCES: 1024, CLIENTS: 128} == host.tuner().read()[0]
    Tuner(other, root=host.root).undo()
    assert host.value(INSTANCES) == 512, "which is what was there when that agent raised it"
    assert host.conf.read_bytes() == CONF
    assert list(host.sysctl_d.iterdir()) == []
    assert set(host.files()) == set(before)


# --- kill -9 ----------------------------------------------------------------------------------------------------------


def killed_after(host: Host, steps: int, act: Callable[[Tuner], object]) -> bool:
    """Let a process act and kill itself after so many steps. Whether it got that far."""
    child = os.fork()
    if child == 0:
        done = 0

        def step(_: str) -> None:
            nonlocal done
            done += 1
            if done == steps:
                os.kill(os.getpid(), signal.SIGKILL)

        try:
            act(host.tuner(step))
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    return os.WIFSIGNALED(status)


def test_a_change_that_is_killed_after_any_step_is_taken_back_whole(tmp_path: Path) -> None:
    steps = 0
    while True:
        steps += 1
        (tmp_path / str(steps)).mkdir()
        host = Host(tmp_path / str(steps))
        before = host.files()
        if not killed_after(host, steps, lambda tuner: tuner.apply(WANTED)):
            break
        host.tuner().repair()
        done = host.value(NEIGHBOURS) == WANTED[NEIGHBOURS]
        if done:  # it was killed after the last step
            host.tuner().undo()
        assert host.files() == before, f"killed after step {steps}"
    assert steps > 5, "journal, two sysctls, both files and journal"


def test_a_second_change_that_is_killed_goes_back_to_the_first(tmp_path: Path) -> None:
    more = {NEIGHBOURS: 16_384, FORWARD: 1, CLIENTS: 128}
    steps = 0
    while True:
        steps += 1
        (tmp_path / str(steps)).mkdir()
        host = Host(tmp_path / str(steps))
        original = host.files()
        host.tuner().apply(WANTED)
        first = host.files()
        if not killed_after(host, steps, lambda tuner: tuner.apply(more)):
            break
        host.tuner().repair()
        assert host.files() == first or host.value(FORWARD) == 1, f"killed after step {steps}"
        host.tuner().undo()
        assert host.files() == original, f"killed after step {steps}"
    assert steps > 5


def test_an_undo_that_is_killed_after_any_step_is_finished(tmp_path: Path) -> None:
    steps = 0
    while True:
        steps += 1
        (tmp_path / str(steps)).mkdir()
        host = Host(tmp_path / str(steps))
        before = host.files()
        host.tuner().apply(WANTED)
        if not killed_after(host, steps, lambda tuner: tuner.undo()):
            break
        host.tuner().repair()
        assert host.files() == before, f"killed after step {steps}"
    assert steps > 5


def test_what_was_killed_is_repaired_before_anything_else_is_changed(host: Host) -> None:
    before = host.files()
    assert killed_after(host, 2, lambda tuner: tuner.apply(WANTED))
    host.tuner().apply({INSTANCES: 256})
    assert (host.value(NEIGHBOURS), host.value(INSTANCES)) == (128, 256)
    host.tuner().undo()
    assert host.files() == before


# --- what is hostile or broken ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "settings",
    [
        {"kernel.core_pattern": 1},
        {"net.ipv4.../../../etc/passwd": 1},
        {"..": 1},
        {"net.ipv4.ip_forward/../ip_forward": 1},
        {NEIGHBOURS: -1},
        {NEIGHBOURS: 1 << 31},
        {FORWARD: 2},
        {FORWARD: 0},
        {CLIENTS: 10**9},
    ],
)
def test_keys_and_values_that_are_not_on_the_list_change_nothing(host: Host, settings: dict[str, int]) -> None:
    before = host.files()
    with pytest.raises(Unfit):
        host.tuner().apply({INSTANCES: 512, **settings})
    assert host.files() == before


def test_a_linked_sysctl_d_is_not_followed(host: Host, tmp_path: Path) -> None:
    host.sysctl_d.rmdir()
    (tmp_path / "elsewhere").mkdir()
    host.sysctl_d.symlink_to(tmp_path / "elsewhere")
    before = host.files()
    with pytest.raises(TuneError, match=r"/etc/sysctl\.d is a link"):
        host.tuner().apply(WANTED)
    assert host.files() == before
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_sysctl_d_that_others_may_write_to_is_not_used(host: Host) -> None:
    host.sysctl_d.chmod(0o777)
    with pytest.raises(TuneError, match="others than root may write"):
        host.tuner().apply(WANTED)
    assert host.value(NEIGHBOURS) == 128


def test_a_link_at_our_files_name_is_replaced_and_not_written_through(host: Host, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_text("mine")
    name = host.tuner().file
    (host.sysctl_d / name).symlink_to(victim)
    (host.sysctl_d / f".{name}.canopy").symlink_to(victim)
    host.tuner().apply(WANTED)
    assert victim.read_text() == "mine"
    assert not (host.sysctl_d / name).is_symlink()


def test_a_linked_configuration_of_libvirt_is_not_followed(host: Host, tmp_path: Path) -> None:
    victim = tmp_path / "victim"
    victim.write_bytes(CONF)
    host.conf.unlink()
    host.conf.symlink_to(victim)
    with pytest.raises(TuneError, match=r"libvirtd\.conf can't be read"):
        host.tuner().apply(WANTED)
    assert victim.read_bytes() == CONF
    assert host.value(NEIGHBOURS) == 128


def test_a_read_only_proc_sys_changes_nothing_and_says_so(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.files()
    opened = os.open

    def read_only(path: str | Path, flags: int, mode: int = 0o777, *, dir_fd: int | None = None) -> int:
        if str(path) == str(host.sysctl(INSTANCES)) and flags & os.O_WRONLY:
            raise OSError(30, "Read-only file system", str(path))
        return opened(path, flags, mode, dir_fd=dir_fd)

    monkeypatch.setattr(os, "open", read_only)
    with pytest.raises(TuneError, match=r"nothing is changed: .*Read-only file system"):
        host.tuner().apply(WANTED)
    assert host.files() == before


def test_a_kernel_that_takes_another_value_gets_the_old_one_back(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.files()
    write = os.write
    monkeypatch.setattr(os, "write", lambda fd, data: write(fd, b"300\n" if data == b"512\n" else data))
    with pytest.raises(TuneError, match="the kernel does not take 512"):
        host.tuner().apply({NEIGHBOURS: 4096, INSTANCES: 512})
    assert host.files() == before


def test_a_full_disk_changes_nothing(host: Host, monkeypatch: pytest.MonkeyPatch) -> None:
    before = host.files()

    def full(*_: object, **__: object) -> None:
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr("agent.tuning._write_at", full)
        with pytest.raises(TuneError, match="nothing is changed: No space left"):
            host.tuner().apply({NEIGHBOURS: 4096})
    assert host.files() == before


@pytest.mark.parametrize("journal", [b"", b"{", b"[]", b'{"entries": 3}', b'{"entries": [{"key": "..", "before": 1}]}'])
def test_a_journal_that_is_none_is_never_acted_on(host: Host, journal: bytes) -> None:
    (host.directory / "tuning").write_bytes(journal)
    before = host.files()
    for act in (lambda: host.tuner().apply(WANTED), host.tuner().undo, host.tuner().repair):
        with pytest.raises(TuneError, match="tuning"):
            act()
    assert host.files() == before


def test_a_block_without_its_end_is_left_to_a_person(host: Host) -> None:
    host.tuner().apply({CLIENTS: 64})
    host.conf.write_bytes(host.conf.read_bytes().replace(b": end", b": fin"))
    with pytest.raises(TuneError, match="without its end: remove it by hand"):
        host.tuner().undo()
    assert b"max_clients = 64" in host.conf.read_bytes()


def test_a_file_too_large_to_be_libvirts_configuration_is_not_read(host: Host) -> None:
    host.conf.write_bytes(b"#" * (2 << 20))
    values, why = host.tuner().read()
    assert values[CLIENTS] is None
    assert "is no configuration of libvirt" in why[CLIENTS]


# --- libvirt's daemon -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "clients"),
    [
        (b"", 5000),
        (b"#max_clients = 7\n", 5000),
        (b"max_clients = 7\nmax_clients = 9\n", 7),
        (b"  max_clients=7 # few\n", 7),
        (b'max_clients = "7"\n', 5000),
        (b"admin_max_clients = 7\n", 5000),
    ],
)
def test_its_configuration_is_read_as_it_reads_it(host: Host, text: bytes, clients: int) -> None:
    host.conf.write_bytes(text)
    assert host.tuner().read()[0][CLIENTS] == clients


def running(host: Host, *, stale: bool) -> Tuner:
    """Of a host whose daemon runs, and has read its configuration or not."""
    daemon = Daemon("libvirtd", Path("etc/libvirt/libvirtd.conf"), 1, stale)
    return Tuner(host.directory, root=host.root, daemon=lambda _: daemon)


def test_a_daemon_that_has_not_read_its_settings_is_named_and_left_alone(
    host: Host, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Daemon] = []

    def restart(daemon: Daemon) -> str:
        asked.append(daemon)
        return ""

    monkeypatch.setattr("agent.tuning.restart", restart)
    assert running(host, stale=True).apply({NEIGHBOURS: 256}).restart == "", "others wrote what it has not read"
    assert running(host, stale=True).apply({CLIENTS: 64}).restart == "libvirtd"
    assert running(host, stale=False).apply({CLIENTS: 64}).restart == ""
    assert not asked
    assert running(host, stale=True).apply({CLIENTS: 64}, restart_libvirt=True).restart == ""
    assert [daemon.name for daemon in asked] == ["libvirtd"]
    monkeypatch.setattr("agent.tuning.restart", lambda _: "no systemd here")
    answer = running(host, stale=True).undo(restart_libvirt=True)
    assert (answer.restart, answer.problem) == (
        "libvirtd",
        "the settings are changed, and libvirtd could not be restarted: no systemd here",
    )
    assert host.conf.read_bytes() == CONF


def test_a_pid_file_that_names_another_process_is_not_believed(host: Host) -> None:
    (host.root / "run").mkdir()
    (host.root / "run" / "libvirtd.pid").write_text(f"{os.getpid()}\n")
    daemon = find_daemon(host.root)
    assert daemon is not None
    assert (daemon.pid, daemon.stale) == (None, False)


def test_the_journal_is_private_and_says_what_was_there(host: Host) -> None:
    host.tuner().apply({INSTANCES: 512})
    journal = host.directory / "tuning"
    assert stat.S_IMODE(journal.stat().st_mode) == 0o600
    (entry,) = msgspec.json.decode(journal.read_bytes())["entries"]
    assert (entry["key"], entry["before"], entry["after"]) == (INSTANCES, 128, 512)
    assert set(TUNABLES) >= {entry["key"]}
