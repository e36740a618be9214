"""A push along a chain of hosts in virtual time, and all that can befall it: everybody who lives gets all of it."""

from __future__ import annotations

from random import Random

import pytest

from protocol.limits import BULK_SILENT
from protocol.stream import Blob
from tests.sim.chain import Chain

CHUNK = 64 << 10
#: Bytes a second: 80 Mbit/s.
RATE = 10e6
COUNT = 160
DATA = Random(1).randbytes(1 << 16) * COUNT
#: What one copy takes over one link, in seconds.
ONE = len(DATA) / RATE
#: 32 MB, half of what is measured on test hosts.
LARGE = bytes(2 * CHUNK) * 256
HOSTS = 12
MIDDLE = HOSTS // 2


def chain(hosts: int = HOSTS, count: int = COUNT, **more: float) -> Chain:
    return Chain(DATA[: count * CHUNK], hosts, chunk=CHUNK, rate=RATE, **more)  # type: ignore[arg-type]


def bypassed(push: Chain) -> dict[int | None, list[int | None]]:
    """Who left whom."""
    return {rank: [source for source, _ in host.bypassed] for rank, host in push.hosts.items() if host.bypassed}


def test_a_chain_takes_little_longer_than_one_copy_and_each_host_sends_what_it_receives() -> None:
    push = chain()
    done = push.run()
    assert set(done) == set(range(HOSTS))
    assert max(done.values()) < 1.4 * ONE
    assert bypassed(push) == {}
    for rank, host in push.hosts.items():
        if rank is not None:
            assert host.sent < 1.1 * len(DATA)
            assert host.received < 1.1 * len(DATA)


def test_each_more_host_costs_little_more_than_one_chunk() -> None:
    few, many = (max(chain(hosts, 40).run().values()) for hosts in (10, 110))
    assert few < many < few + 100 * 2 * CHUNK / RATE


def test_a_host_killed_in_the_middle_costs_the_others_hardly_anything() -> None:
    push = chain()
    push.at(ONE / 2, lambda: push.kill(MIDDLE))
    done = push.run()
    assert set(done) == set(range(HOSTS)) - {MIDDLE}
    assert max(done.values()) < 1.6 * ONE
    assert bypassed(push) == {MIDDLE + 1: [MIDDLE]}


@pytest.mark.parametrize("fault", ["freeze", "cut"])
def test_a_host_that_falls_silent_costs_the_others_its_silence_and_no_more(fault: str) -> None:
    push = chain()
    push.at(ONE / 2, lambda: getattr(push, fault)(MIDDLE))
    done = push.run()
    assert set(done) == set(range(HOSTS)) - {MIDDLE}
    assert max(done.values()) < 1.4 * ONE + BULK_SILENT + 1
    assert MIDDLE in bypassed(push)[MIDDLE + 1]
    assert not set(bypassed(push)) & set(range(MIDDLE + 2, HOSTS)), (
        "those further behind were told that it takes a while"
    )


def test_several_in_a_row_are_bypassed_one_after_the_other() -> None:
    push = chain()
    for rank in (MIDDLE, MIDDLE - 1, MIDDLE - 2):
        push.at(ONE / 2, lambda rank=rank: push.kill(rank))  # type: ignore[misc]
    done = push.run()
    assert set(done) == set(range(HOSTS)) - {MIDDLE, MIDDLE - 1, MIDDLE - 2}
    assert bypassed(push)[MIDDLE + 1] == [MIDDLE, MIDDLE - 1, MIDDLE - 2]


def test_where_all_before_it_are_dead_a_host_asks_the_root() -> None:
    push = chain()
    for rank in range(HOSTS - 1):
        push.at(ONE / 2, lambda rank=rank: push.kill(rank))  # type: ignore[misc]
    assert set(push.run()) == {HOSTS - 1}


@pytest.mark.parametrize("what", ["rate", "disk"])
def test_a_host_that_is_slow_holds_up_nobody_behind_it(what: str) -> None:
    push = chain()
    setattr(push.hosts[MIDDLE], what, RATE / 10)
    done = push.run()
    slow = done.pop(MIDDLE)
    assert max(done.values()) < ONE + 2.5 < slow
    assert MIDDLE in bypassed(push)[MIDDLE + 1]
    assert set(bypassed(push)) <= {MIDDLE + 1, MIDDLE + 2}


@pytest.fixture(scope="module")
def undisturbed() -> float:
    """How long 32 MB take to 8 hosts, in seconds."""
    return max(Chain(LARGE, 8, chunk=2 * CHUNK, rate=RATE).run().values())


@pytest.mark.parametrize("slow", [0, 1])
def test_one_host_at_a_tenth_of_the_rate_costs_the_others_less_than_a_third_wherever_it_is(
    slow: int, undisturbed: float
) -> None:
    push = Chain(LARGE, 8, chunk=2 * CHUNK, rate=RATE)
    push.hosts[slow].rate = RATE / 10
    push.begin()
    while any(host.finished is None for rank, host in push.hosts.items() if rank not in (None, slow)):
        push.step()
    assert push.now < 1.3 * undisturbed
    assert bypassed(push) == {slow + 1: [slow]}


def test_a_chain_that_is_slow_all_along_is_left_as_it_is() -> None:
    push = chain(disk=RATE / 2)
    push.run()
    assert bypassed(push) == {}


def test_a_host_that_comes_back_goes_on_with_what_it_has() -> None:
    push = chain()
    push.at(ONE / 2, lambda: push.kill(MIDDLE))
    push.at(ONE / 2 + 0.5, lambda: push.restart(MIDDLE))
    before: list[int] = []
    push.at(ONE / 2 + 0.5, lambda: before.append(push.hosts[MIDDLE].received))
    assert set(push.run()) == set(range(HOSTS))
    assert push.hosts[MIDDLE].received < 1.3 * len(DATA)
    assert before[0] > 0.2 * len(DATA)


def test_the_service_may_begin_anew_in_mid_push() -> None:
    push = chain()
    push.at(ONE / 2, push.restart_root)
    done = push.run()
    assert set(done) == set(range(HOSTS))
    assert push.hosts[None].sent < 1.3 * len(DATA)


def test_a_thawed_host_goes_on() -> None:
    push = chain()
    push.at(ONE / 2, lambda: push.freeze(MIDDLE))
    push.at(ONE / 2 + 6, lambda: push.thaw(MIDDLE))
    push.at(ONE / 2 + 6.1, lambda: None)
    push.run()
    while push.hosts[MIDDLE].finished is None:
        push.step()
    push.check()


def test_a_host_that_alters_chunks_is_left_and_its_lies_are_stored_nowhere() -> None:
    push = chain()

    def alter(index: int, blob: Blob) -> Blob:
        return bytes(CHUNK) if index % 7 == 3 else blob

    push.alters[MIDDLE] = alter
    assert set(push.run()) == set(range(HOSTS))
    assert bypassed(push) == {MIDDLE + 1: [MIDDLE]}


def test_where_the_processor_is_the_limit_chunks_are_asked_for_by_the_half_window() -> None:
    calm, pressed = Chain(DATA, HOSTS, chunk=CHUNK, rate=RATE), Chain(DATA, HOSTS, chunk=CHUNK, rate=RATE)
    for rank in pressed.hosts:
        pressed.press(rank)
    assert set(calm.run()) == set(pressed.run()) == set(range(HOSTS))
    assert pressed.questions < calm.questions / 2
    assert max(host.sent for host in pressed.hosts.values()) <= 1.1 * len(DATA)


def test_a_head_passes_through_before_the_rest() -> None:
    push = Chain(DATA, HOSTS, chunk=CHUNK, rate=RATE, head=5)
    assert set(push.run()) == set(range(HOSTS))


@pytest.mark.parametrize("seed", range(8))
def test_whatever_happens_who_lives_gets_all_of_it(seed: int) -> None:
    chooser = Random(seed)
    push = Chain(DATA[: 60 * CHUNK], HOSTS, chunk=CHUNK, rate=RATE, seed=seed, head=chooser.choice((0, 3)))
    for rank in chooser.sample(range(HOSTS), 2):
        push.hosts[rank].rate = RATE / chooser.choice((2, 10))
    killed = chooser.sample(range(HOSTS), 4)
    for rank in killed:
        when = chooser.uniform(0, ONE)
        push.at(when, lambda rank=rank: push.kill(rank))  # type: ignore[misc]
        if chooser.random() < 0.5:
            push.at(when + chooser.uniform(0.01, 3), lambda rank=rank: push.restart(rank))  # type: ignore[misc]
    frozen = chooser.choice(sorted(set(range(HOSTS)) - set(killed)))
    when = chooser.uniform(0, ONE)
    push.at(when, lambda: push.freeze(frozen))
    push.at(when + chooser.uniform(0.1, 4), lambda: push.thaw(frozen))
    if chooser.random() < 0.3:
        push.at(chooser.uniform(0, ONE), push.restart_root)
    for rank in chooser.sample([None, *range(HOSTS)], HOSTS // 2):
        push.at(chooser.uniform(0, ONE), lambda rank=rank: push.press(rank))  # type: ignore[misc]
    push.run()
    assert all(host.failed is None for host in push.hosts.values())
