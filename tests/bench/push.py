"""`ctl push` beside TakTuk `put`, `clush --copy` and parallel scp, on test hosts of this machine, in one run.

    python -m tests.bench.push [--only shaped,node,draw,…] [--hosts 32] [--mb 64] [--svg FILE]

Each part stands alone. Shaped parts have links of 80 Mbit/s both ways at every host; the service node's own is shaped
in part `node` alone, which the other tools take ten times as long for. Data is random, so that nothing compresses. All
hosts share this machine's cores: the load average is printed.
"""

from __future__ import annotations

import argparse
import functools
import random
import shutil
import signal
import statistics
import subprocess
import sys
import tarfile
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

from tests.bench import bare
from tests.bench.drawing import curve
from tests.bench.pushfleet import MB, MIB, RATE, RATE_MBIT, SLOW_MBIT, Fleet, ctl, fleet_of, random_file, say

# --- the others -------------------------------------------------------------------------------------------------------


def _others(fleet: Fleet, source: Path) -> dict[str, Callable[[], None]]:
    """The tools that people use now, as far as they are installed."""
    options = f"-F {fleet.config}"
    everybody = f"h[0-{len(fleet.names) - 1}]"

    def clush() -> None:
        arguments = [
            "-q",
            "-f",
            "64",
            "-w",
            everybody,
            "-o",
            options,
            "--copy",
            str(source),
            "--dest",
            "/tmp/other-clush",
        ]
        _run(["clush", *arguments])

    def taktuk() -> None:
        machines = [word for name in fleet.names for word in ("-m", name)]
        orders = ["broadcast", "put", "[", str(source), "]", "[", "/tmp/other-taktuk", "]"]
        _run(["taktuk", "-c", f"ssh {options}", *machines, *orders])

    def scp() -> None:
        running = [
            subprocess.Popen(["scp", "-q", "-F", str(fleet.config), str(source), f"{name}:/tmp/other-scp"])
            for name in fleet.names
        ]
        for process in running:
            if process.wait():
                raise SystemExit("scp failed")

    tools = (("clush", "clush --copy", clush), ("taktuk", "TakTuk put", taktuk), ("scp", "parallel scp", scp))
    return {name: run for program, name, run in tools if shutil.which(program)}


def _run(argv: list[str]) -> None:
    done = subprocess.run(argv, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{argv[0]}: {(done.stderr or done.stdout)[-1_000:]}")


def compete(fleet: Fleet, source: Path, *, limit_s: float | None, others: bool) -> float:
    """One contest; ours against `limit_s` where that is said. Returns our time in seconds."""
    fleet.touch(source.stat().st_size)
    ours = ctl("push", "-q", str(source), "/tmp/pushed-ctl")
    size, hosts = source.stat().st_size, len(fleet.names)
    beside = "" if limit_s is None else f"   {ours / limit_s:.3f} x size / rate"
    say(f"{size / MB:.0f} MB to {hosts:3} hosts: ctl push          {ours:8.2f} s{beside}")
    fleet.clean()
    for name, tool in _others(fleet, source).items() if others else ():
        began = time.perf_counter()
        tool()
        wall = time.perf_counter() - began
        say(f"{size / MB:.0f} MB to {hosts:3} hosts: {name:18}{wall:8.2f} s   {wall / ours:.1f} times ours")
        fleet.clean()
    return ours


# --- the parts --------------------------------------------------------------------------------------------------------


def shaped(hosts: int, size: int) -> None:
    """64 MB over links of 80 Mbit/s, to 8 hosts and to 32."""
    for count in sorted({min(8, hosts), hosts}):
        with fleet_of(count, rate=RATE_MBIT) as fleet, random_file(size) as source:
            compete(fleet, source, limit_s=size / RATE, others=True)


def node(hosts: int, size: int) -> None:
    """The same to 8 hosts where the service node's link is no faster than theirs."""
    with fleet_of(min(8, hosts), rate=RATE_MBIT, node_rate=RATE_MBIT) as fleet, random_file(size) as source:
        compete(fleet, source, limit_s=size / RATE, others=True)


def draw(hosts: int, size: int, *, svg: Path | None = None) -> None:
    """The time as a function of the number of hosts."""
    times: dict[int, float] = {}
    with random_file(size) as source:
        count = 2
        while count <= hosts:
            with fleet_of(count, rate=RATE_MBIT) as fleet:
                times[count] = compete(fleet, source, limit_s=size / RATE, others=False)
            count *= 2
    most = max(times.values())
    for count, wall in times.items():
        print(f"{count:4} hosts {wall:7.2f} s {'#' * round(60 * wall / most)}")
    print(f"size / rate{size / RATE:8.2f} s {'#' * round(60 * size / RATE / most)}")
    if svg is not None:
        title = f"{size / MB:.0f} MB over links of {RATE_MBIT:.0f} Mbit/s"
        svg.write_text(curve(title, times, ("size / rate", size / RATE), x="hosts", y="seconds"))
        print(f"drawn in {svg}")


def unshaped(hosts: int, size: int) -> None:
    """64 MiB to all hosts without limit; and the least that such a chain takes in Python, with and without a disk."""
    with fleet_of(hosts) as fleet, random_file(size // MB * MIB) as source:
        compete(fleet, source, limit_s=None, others=True)
        data = source.read_bytes()
        for to, what in (("/tmp/other-bare", "bare chain"), ("/dev/null", "bare, no disk")):
            say(f"{len(data) / MB:.0f} MB to {hosts:3} hosts: {what:18}{bare.send(fleet, data, to):8.2f} s")
            fleet.clean()


def hop(hosts: int, size: int) -> None:
    """Eight times as much to 8 hosts, against one CURVE hop between two processes of this machine."""
    size *= 8
    one = _curve_hop(size)
    say(f"one CURVE hop: {size / one / MB:.0f} MB/s")
    with fleet_of(min(8, hosts)) as fleet, random_file(size) as source:
        before = fleet.cpu()
        done = fleet.push(source)
        spent = fleet.cpu() - before
        wall, bytes_in = max(done.values()), size * len(done)
        rate = bytes_in / wall
        say(
            f"{size / MB:.0f} MB to {len(done)} hosts: {wall:.2f} s, {rate / MB:.0f} MB/s in all, "
            f"{rate / (size / one):.2f} of one hop; {spent / bytes_in * 1e9:.2f} CPU-s for each GB and host"
        )


def _curve_hop(size: int) -> float:
    """Seconds for so many bytes from one process to another over a CURVE socket, in frames of a chunk."""
    import zmq

    from protocol.limits import CHUNK

    (server, server_secret), (client, client_secret) = zmq.curve_keypair(), zmq.curve_keypair()
    context: zmq.Context[zmq.Socket[bytes]] = zmq.Context()
    pull = context.socket(zmq.PULL)
    pull.curve_server, pull.curve_publickey, pull.curve_secretkey = True, server, server_secret
    port = pull.bind_to_random_port("tcp://127.0.0.1")
    program = (
        "import os, sys, zmq\n"
        "s = zmq.Context().socket(zmq.PUSH)\n"
        "s.curve_serverkey, s.curve_publickey, s.curve_secretkey = (x.encode() for x in sys.argv[1:4])\n"
        "s.sndhwm = 64\n"
        "s.connect('tcp://127.0.0.1:' + sys.argv[4])\n"
        "data = os.urandom(int(sys.argv[5]))\n"
        "for _ in range(int(sys.argv[6])): s.send(data)\n"
        "s.close(60_000)\n"
    )
    keys = [key.decode() for key in (server, client, client_secret)]
    count = size // CHUNK
    sender = subprocess.Popen([sys.executable, "-c", program, *keys, str(port), str(CHUNK), str(count)])
    pull.recv()
    began = time.perf_counter()
    for _ in range(count - 1):
        pull.recv()
    wall = time.perf_counter() - began
    sender.wait()
    context.destroy(0)
    return wall


def memory(hosts: int, size: int) -> None:
    """How much the agents' resident memory grows: four times as much, again and again, two at a time, many files."""
    with (
        tempfile.TemporaryDirectory() as folder,
        fleet_of(min(8, hosts)) as fleet,
        random_file(4 * size) as source,
        random_file(size) as other,
    ):

        def both() -> None:
            threads = [threading.Thread(target=fleet.push, args=(one,)) for one in (source, other)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()

        def all_of_it() -> None:
            for what, work in (
                (f"{4 * size / MB:.0f} MB", lambda: fleet.push(source)),
                ("a second time", lambda: fleet.push(source)),
                ("10,000 files", lambda: fleet.push(_tree(Path(folder)))),
                ("49,000 files", lambda: fleet.push(_tree(Path(folder), 49_000))),
                (f"{4 * size / MB:.0f} MB and {size / MB:.0f} MB at a time", both),
            ):
                grown = fleet.growth(work)
                say(f"{what}: RSS of an agent grows by {grown[0]:.1f} to {grown[-1]:.1f} MiB")
                fleet.clean()

        grown = fleet.growth(all_of_it)
        say(f"all of it to {len(fleet.names)} hosts: RSS of an agent grows by {grown[0]:.1f} to {grown[-1]:.1f} MiB")


def slow(hosts: int, size: int) -> None:
    """One host at 8 Mbit/s among those at 80: in the middle, and the first of all."""
    with random_file(size) as source:
        with fleet_of(hosts, rate=RATE_MBIT) as fleet:
            without = max(fleet.push(source).values())
        for place in (hosts // 2, 0):
            with fleet_of(hosts, rate=RATE_MBIT, slow=place) as fleet:
                done = fleet.push(source, until={f"h{place}"})
            done.pop(f"h{place}", None)
            wall = max(done.values())
            say(
                f"number {place + 1} of {hosts} at {SLOW_MBIT:.0f} Mbit/s: the {len(done)} others {wall:.2f} s, "
                f"{wall / without:.2f} of {without:.2f} s without it"
            )


def kill(hosts: int, size: int) -> None:
    """A host in the middle is killed at half time, or its agent stopped, or its cable pulled."""
    with random_file(size) as source, fleet_of(hosts, rate=RATE_MBIT) as fleet:
        without = max(fleet.push(source).values())
        fleet.clean()
        middle = fleet.by_rank()[hosts // 2]
        for what, strike, heal in (
            ("frozen", fleet.hosts.freeze, fleet.hosts.thaw),
            ("without its cable", fleet.hosts.cut, fleet.hosts.heal),
            ("killed", fleet.hosts.power_off, None),
        ):
            done = fleet.push(source, without / 2, functools.partial(strike, middle), until={middle})
            done.pop(middle, None)
            wall = max(done.values())
            say(
                f"one of {hosts} {what} at half time: {len(done)} others {wall:.2f} s, "
                f"{wall - without:+.2f} s beside {without:.2f} s without"
            )
            if heal is not None:
                heal(middle)
                fleet.session.wait_for(fleet.names, 60.0)
                fleet.clean()


def files(hosts: int, size: int) -> None:
    """10,000 files of 1 KB as a directory against one file of 10 MB, to 16 hosts: in the hosts' roots, which are
    overlays and make each file twice, and on their data disks, which are plain directories as real hosts' are. First
    with links of 80 Mbit/s, then without limit: there these 160,000 files are what this machine's cores have to do, and
    what tar takes for them alone is said too."""
    del size
    hosts = min(16, hosts)
    with tempfile.TemporaryDirectory() as folder, random_file(10 * MB) as source:
        tree = _tree(Path(folder))
        for rate, links in ((RATE_MBIT, f"{RATE_MBIT:.0f} Mbit/s"), (None, "no limit")):
            for where, disk in (("/tmp", "overlay"), ("/srv", "data disk")):
                with fleet_of(hosts, rate=rate) as fleet:
                    _many_and_one(fleet, tree, source, where, f"{links}, {disk}")
                    if rate is None:
                        wall = _unpack(fleet, tree, where)
                        say(f"{links}, {disk}: tar alone, from an archive on each host: {wall:.2f} s")


def _many_and_one(fleet: Fleet, tree: Path, source: Path, where: str, what: str) -> None:
    """Each three times in turn: the first of a new fleet is the slowest, since agents load then what it takes."""
    took: dict[Path, list[float]] = {source: [], tree: []}
    for _ in range(3):
        for which, walls in took.items():
            before = fleet.cpu()
            walls.append(max(fleet.push(which, folder=where).values()))
            name = "one file of 10 MB   " if which is source else "10,000 files of 1 KB"
            say(f"{what}: {name} {walls[-1]:.2f} s, {fleet.cpu() - before:.1f} CPU-s in all")
        fleet.clean()
    many, one = took[tree], took[source]
    say(
        f"{what}: many take {many[0] / one[0]:.1f} times as long as one at first, "
        f"{statistics.median(many) / statistics.median(one):.1f} times by the medians"
    )


def _unpack(fleet: Fleet, tree: Path, where: str) -> float:
    """Seconds that all hosts take to make the same files from an archive that they have: nothing travels."""
    archive = tree.with_suffix(".tar")
    with tarfile.open(archive, "w") as file:
        file.add(tree, tree.name)
    fleet.push(archive, folder=where)
    began = time.perf_counter()
    results = fleet.session.run(f"mkdir {where}/other-tree && tar -xf {where}/pushed-* -C {where}/other-tree").results()
    wall = time.perf_counter() - began
    if not all(result.ok for result in results):
        raise SystemExit(f"not all hosts could unpack it: {results}")
    return wall


def _tree(folder: Path, count: int = 10_000) -> Path:
    """So many files of 1 KB."""
    tree = folder / f"tree-{count}"
    if not tree.exists():
        for number in range(count):
            path = tree / f"{number // 100}" / f"{number}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(random.Random(number).randbytes(1_000))
    return tree


def latency(hosts: int, size: int) -> None:
    """A broadcast of a program that does nothing: on an idle fleet, and while a push is under way."""
    for what, rate, mass in (("unshaped", None, 8 * size), (f"at {RATE_MBIT:.0f} Mbit/s", RATE_MBIT, size)):
        with fleet_of(min(8, hosts), rate=rate) as fleet, random_file(mass) as source:
            fleet.touch(mass)
            idle = [fleet.answer() for _ in range(50)]
            pushing = threading.Thread(target=fleet.push, args=(source,))
            pushing.start()
            time.sleep(0.2)  # the command and the first chunks have been everywhere
            busy: list[float] = []
            while pushing.is_alive():
                busy.append(fleet.answer())
            del busy[-1:]
            before, during = statistics.median(idle), statistics.median(busy)
            say(
                f"{what}, {len(fleet.names)} hosts: median {before * 1e3:.1f} ms idle, {during * 1e3:.1f} ms during a "
                f"push ({len(busy)} broadcasts), {during / before:.1f} times; the slowest {max(busy) * 1e3:.0f} ms"
            )


def fair(hosts: int, size: int) -> None:
    """Two pushes at a time over the same links, and a small one that begins while a large one is under way."""
    with (
        fleet_of(min(8, hosts), rate=RATE_MBIT) as fleet,
        random_file(size) as one,
        random_file(size + 1) as two,
        random_file(size // 8) as little,
    ):
        alone = max(fleet.push(little).values())
        both = _together(fleet, [(one, 0.0), (two, 0.0)])
        say(
            f"two of {size / MB:.0f} MB: {both[0]:.2f} and {both[1]:.2f} s, "
            f"{max(both) / (2 * size / RATE):.2f} x sizes / rate"
        )
        fleet.clean()
        mixed = _together(fleet, [(one, 0.0), (little, 0.2 * size / RATE)])
        say(
            f"{size // 8 / MB:.0f} MB while {size / MB:.0f} MB are under way: {mixed[1]:.2f} s, "
            f"{mixed[1] / alone:.1f} times as long as alone (a fair share: 2)"
        )


def _together(fleet: Fleet, pushes: list[tuple[Path, float]]) -> list[float]:
    """Pushes that begin after so many seconds each; how long each took."""
    took = [0.0] * len(pushes)

    def push(number: int, source: Path, after: float) -> None:
        time.sleep(after)
        took[number] = max(fleet.push(source).values())

    threads = [threading.Thread(target=push, args=(number, *one)) for number, one in enumerate(pushes)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return took


def inline(hosts: int, size: int) -> None:
    """Small files: down the control tree with the command, or by the bulk path. Where the one overtakes the other."""
    from protocol import limits

    del size
    with fleet_of(min(32, hosts), rate=RATE_MBIT, node_rate=RATE_MBIT) as fleet:
        for kib in (1, 4, 16, 32, 64, 65, 96, 128, 256):
            with random_file(kib << 10) as source:
                took = sorted(max(fleet.push(source).values()) for _ in range(7))[3]
            way = "with the command" if kib << 10 <= limits.MAX_INLINE else "by the bulk path"
            say(f"{kib:4} KiB to {len(fleet.names)} hosts {way}: {took * 1e3:.0f} ms (median of 7)")
            fleet.clean()


PARTS: dict[str, Callable[..., None]] = {
    part.__name__: part
    for part in (shaped, node, draw, unshaped, hop, memory, slow, kill, files, latency, fair, inline)
}


def main() -> int:
    """The benchmark."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", default=",".join(PARTS), help="parts, separated by commas")
    parser.add_argument("--hosts", type=int, help="at most so many hosts (default: each part's own)")
    parser.add_argument("--mb", type=int, default=64, help="how much is pushed, in MB")
    parser.add_argument("--svg", type=Path, help="where part draw draws its curve")
    own = {"node": 8, "draw": 64, "unshaped": 64, "hop": 8, "memory": 8, "files": 16, "latency": 8, "fair": 8}
    arguments = parser.parse_args()
    for name in arguments.only.split(","):
        print(f"-- {name}: {PARTS[name].__doc__}", flush=True)
        more = {"svg": arguments.svg} if name == "draw" else {}
        PARTS[name](arguments.hosts or own.get(name, 32), arguments.mb * MB, **more)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))
    sys.exit(main())
