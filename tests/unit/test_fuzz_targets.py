"""What `make fuzz` drives is sound: samples are taken and reach the end, and what a target can't take is seen."""

from __future__ import annotations

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from agent.seed_frames import BadFrame, up
from controller import api
from controller.infra import parse_infra
from controller.profile import parse_profile
from protocol import listing
from protocol.checks import HostFacts
from protocol.codec import decode
from tests.fuzz import __main__ as main
from tests.fuzz.__main__ import mutants
from tests.fuzz.targets import TARGETS, Target, _frames


@pytest.mark.parametrize("target", TARGETS.values(), ids=lambda target: target.name)
def test_each_target_takes_its_samples_and_what_is_near_them(target: Target) -> None:
    for sample in target.seeds:
        target.take(sample)

    @settings(derandomize=True, deadline=None, max_examples=50, database=None)
    @given(st.one_of(st.binary(max_size=64), mutants(target.seeds)))
    def take(data: bytes) -> None:
        target.take(data)

    take()


def test_samples_pass_all_checks_so_that_a_fuzzer_begins_behind_them() -> None:
    for sample in TARGETS["codec"].seeds:
        decode(_frames(sample))
    parse_infra(TARGETS["infra"].seeds[0])
    parse_profile(TARGETS["profile"].seeds[0])
    listing.unpack(TARGETS["listing"].seeds[0])
    for sample in TARGETS["request"].seeds:
        api.unpack_request(sample[api.LENGTH_BYTES :])
    for sample in TARGETS["reply"].seeds:
        api.unpack_reply(sample[api.LENGTH_BYTES :])
    msgspec.json.decode(TARGETS["facts"].seeds[0], type=HostFacts)


def test_what_a_target_cannot_take_is_the_end_on_the_smallest_input(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[bytes] = []

    def fragile(data: bytes) -> None:
        tried.append(data)
        assert b"!" not in data

    monkeypatch.setitem(main._TARGETS, "fragile", (mutants((b"one!two",)), fragile))
    with pytest.raises(AssertionError):
        main.fuzz("fragile")
    assert b"!" in tried[-1]


@pytest.mark.parametrize("data", [b'{"t": "ping", "x": ' + b"[" * 60_000, b'{"t": "\xff"}', b"", b"[]"])
def test_a_frame_of_a_seed_that_is_none_is_an_error_of_that_seed_alone(data: bytes) -> None:
    with pytest.raises(BadFrame):
        up(data)
