"""What `ctl broadcast` asks for, as whom, where and with what; and a job's whole output from its host."""

from __future__ import annotations

import io
from pathlib import Path

import pytest

from controller import api
from controller.ctl.asking import standard_input
from controller.status import CtlError, ExitStatus
from protocol.limits import MAX_SCRIPT
from protocol.outcomes import Exited, Fold, Output, Refused
from tests.unit import fake_service as fake
from tests.unit.fake_service import Client, FakeService
from tests.unit.test_cli import Ctl, answering, ctl, service

__all__ = ["ctl", "service"]  # fixtures


def _asked(service: FakeService) -> api.RunOn:
    (asked,) = service.asked(api.RunOn)
    return asked


def test_words_after_two_dashes_are_no_shells(service: FakeService, ctl: Ctl) -> None:
    answering(service, 1, fake.fold([0]))
    assert ctl("broadcast", "-q", "--", "printf", "%s", "a b").status == 0
    assert _asked(service).argv == ("printf", "%s", "a b")


def test_both_ways_of_reading_take_two_dashes_alike(service: FakeService, ctl: Ctl) -> None:
    answering(service, 1, fake.fold([0]))
    assert ctl("broadcast", "-q", "--nice", "5", "--", "printf", "--", "x").status == 0
    assert (_asked(service).argv, _asked(service).nice) == (("printf", "--", "x"), 5)


def test_all_that_a_command_can_be_given_arrives(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    script = tmp_path / "fix.sh"
    script.write_bytes(b"#!/bin/sh\n")
    answering(service, 1, fake.fold([0]))
    done = ctl(
        *("broadcast", "-q", "--cwd", "/srv", "--env", "A=b=c", "--env", "D=", "--user", "bob", "--nice", "-5"),
        *(
            "--kill-after",
            "7.5",
            "--limit",
            "nofile=1k,core=0",
            "--limit",
            "as=none",
            "--script",
            str(script),
            "x",
            "y",
        ),
    )
    assert done.status == 0
    asked = _asked(service)
    assert asked.argv == ("fix.sh", "x", "y")
    assert (asked.cwd, asked.env, asked.user, asked.nice) == ("/srv", {"A": "b=c", "D": ""}, "bob", -5)
    assert (asked.kill_after, asked.limits) == (7.5, {"nofile": 1024, "core": 0, "as": -1})
    assert asked.script == b"#!/bin/sh\n"


def test_all_mistakes_are_told_at_once_and_nothing_is_asked(service: FakeService, ctl: Ctl, tmp_path: Path) -> None:
    missing = tmp_path / "missing"
    done = ctl("broadcast", "--env", "A", "--limit", "nofile=many", "--script", str(missing))
    assert done.status == ExitStatus.USAGE
    for part in ("--env A: write NAME=VALUE", "--limit nofile=many: write", f"--script {missing}: No such file"):
        assert part in done.err
    assert not service.requests


@pytest.mark.parametrize(
    ("arguments", "part"),
    [
        (["broadcast"], "give a command, or a --script"),
        (["broadcast", "--stdin", "--batch", "1", "cat"], "leave --stdin or --batch out"),
    ],
)
def test_what_does_not_go_together_is_refused(service: FakeService, ctl: Ctl, arguments: list[str], part: str) -> None:
    done = ctl(*arguments)
    assert done.status == ExitStatus.USAGE
    assert part in done.err
    assert not service.requests


def test_little_input_goes_with_the_command_and_more_is_sent_as_it_is_taken(tmp_path: Path) -> None:
    small, large = tmp_path / "small", tmp_path / "large"
    small.write_bytes(b"abc")
    large.write_bytes(b"x" * (MAX_SCRIPT + 1))
    with small.open("rb") as file:
        assert standard_input(file, whole=False) == b"abc"
    with large.open("rb") as file:
        assert standard_input(file, whole=False) is file
    with large.open("rb") as file, pytest.raises(CtlError, match="--detach takes at most"):
        standard_input(file, whole=True)


def test_input_is_sent_no_further_than_there_is_room_and_its_end_is_told(service: FakeService) -> None:
    from controller import Session

    sent: list[bytes] = []

    def answer(request: api.RunOn, client: Client) -> None:
        assert request.feed
        client.send(api.Accepted(id=7, hosts=fake.names(1)), api.InputRoom(upto=4))
        for upto in (4, 6, 100):
            client.send(api.InputRoom(upto=upto))
            while sum(map(len, sent)) < min(upto, 10):
                received = client.receive()
                assert isinstance(received, api.InputData)
                sent.append(received.data)
                assert sum(map(len, sent)) <= upto
        last = client.receive()
        assert last == api.InputData(data=b"", last=True)
        client.send(api.Folded(folds=(fake.fold([0]),)), api.Settled())

    service.on(api.RunOn, answer)
    (result,) = Session().run("cat", stdin=io.BytesIO(b"0123456789")).results()
    assert result.ok
    assert b"".join(sent) == b"0123456789"


# --- ctl job ID --output HOST -----------------------------------------------------------------------------------------


def _record(service: FakeService, output: Output) -> None:
    fold = fake.fold([0], Exited(0), output)
    service.replies(api.FollowJob, api.Accepted(id=7, hosts=fake.names(2)), api.Folded(folds=(fold,)), api.OnRecord())


def test_an_output_that_is_on_record_is_not_fetched(service: FakeService, ctl: Ctl) -> None:
    _record(service, fake.printed(b"out\xff", b"err\n"))
    done = ctl("job", "7", "--output", "h0")
    assert (done.status, done.out, done.err) == (0, b"out\xff", "err\n")
    assert not service.asked(api.GetOutput)


def test_an_output_beyond_its_budget_is_fetched_whole(service: FakeService, ctl: Ctl) -> None:
    _record(service, Output(b"01", b"err\n", 6, 4, "/spool/7.out"))
    service.replies(
        api.GetOutput,
        api.Accepted(id=8, hosts={0: "h0"}),
        api.Streamed(rank=0, stream=1, offset=0, data=b"0123"),
        api.Streamed(rank=0, stream=1, offset=4, data=b"45"),
        api.Folded(folds=(fake.fold([0], Exited(0), Output(out_total=6)),)),
        api.Settled(),
    )
    done = ctl("job", "7", "--output", "h0")
    assert (done.status, done.out, done.err) == (0, b"012345", "err\n")
    assert service.asked(api.GetOutput) == [api.GetOutput(job=7, host="h0")]


@pytest.mark.parametrize(
    ("fold", "part"),
    [
        (fake.fold([0], Refused("the output of job 7 is not kept here")), "refused: the output of job 7 is not kept"),
        (fake.fold([0], Exited(0), Output(out_total=6)), "not all arrived"),
    ],
)
def test_an_output_that_can_not_be_had_whole_is_an_error(service: FakeService, ctl: Ctl, fold: Fold, part: str) -> None:
    _record(service, Output(b"01", b"", 6, 0, "/spool/7.out"))
    service.replies(
        api.GetOutput,
        api.Accepted(id=8, hosts={0: "h0"}),
        api.Folded(folds=(fold,)),
        api.Settled(),
    )
    done = ctl("job", "7", "--output", "h0")
    assert done.status != 0
    assert part in done.err


def test_a_host_without_an_outcome_has_no_output(service: FakeService, ctl: Ctl) -> None:
    _record(service, fake.printed(b"x"))
    done = ctl("job", "7", "--output", "h1")
    assert done.status == ExitStatus.NO_TARGET
    assert "h1 has no outcome of job 7" in done.err
