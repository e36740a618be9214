"""A command line that is wrong in several places is told all of them at once, and changes nothing."""

from __future__ import annotations

import pytest

from controller import api
from controller.ctl.app import app
from controller.status import CtlError, ExitStatus, Mistakes
from tests.unit import fake_service as fake
from tests.unit.fake_service import FakeService
from tests.unit.test_cli import Ctl, ctl, service

__all__ = ["ctl", "service"]  # fixtures


@pytest.mark.parametrize(
    ("line", "parts"),
    [
        (
            """broadcast -w h99 -x @nope -w h[ -f 3 --nice 99 --kill-after -1 -u nan --batch x --max-fail y
            --output-limit 9z -L --json --env A --limit b x""",
            [
                *("--nice", "--kill-after", "--timeout", "--batch x", "--max-fail y", "--output-limit 9z"),
                *("-L, --json", "--env A", "--limit b", "-f has no meaning", "'h['", "@nope"),
            ],
        ),
        (
            "push --owner a:b:c --mode 9 --suffix a/b --checksum never --pick 0 -w h99 /nowhere/at/all x",
            ["--owner", "--mode 9", "--suffix", "--checksum", "--pick", "h99", "/nowhere/at/all", "'x' is no path"],
        ),
        ("push --owner a:b:c", ["--owner", "'FILE...'", "'DST'", "write ctl push"]),
        ("pull --pick 0 -w hh1 -x h[ a b c", ["--pick", "'h['", "'a' is no", "'b' is no"]),
        (
            """spawn /nowhere.conf --wave x --max-fail y --timeout 0 --disk 3 --spread --pack --min-hosts z
            --deployment a/b""",
            [
                *("--wave x", "--max-fail y", "--timeout", "--disk 3", "--spread or --pack"),
                *("--min-hosts z", "'a/b' is no deployment name", "/nowhere.conf: No such file"),
            ],
        ),
        ("plan /nowhere.conf --disk 3 --skip-ips -1", ["--disk 3", "--skip-ips", "/nowhere.conf"]),
        (
            "up --fanout 0 --tries 0 -w h[ --min-up x --wave y --label gpu- --site-from ( --libvirt x",
            ["--fanout", "--tries", "'h['", "--min-up x", "--wave y", "--label", "--site-from", "--libvirt"],
        ),
        ("up --local 3 -w h1 --min-up 9", ["--local makes its hosts itself", "--min-up 9"]),
        ("jobs -n 0", ["--count"]),
        ("vm start --timeout 0 --hard x", ["--hard"]),
    ],
)
def test_all_mistakes_are_told_at_once_and_nothing_is_done(
    service: FakeService, ctl: Ctl, line: str, parts: list[str]
) -> None:
    service.replies(api.GetStatus, fake.status(fake.host(0)))
    done = ctl(*line.split())
    assert done.status == ExitStatus.USAGE
    assert [part for part in parts if part not in done.err] == []
    assert all(isinstance(request, api.GetStatus) for request in service.requests), "questions alone"


def test_one_mistake_alone_is_one_sentence(service: FakeService, ctl: Ctl) -> None:
    assert ctl("broadcast", "--nice", "99", "x").err == (
        "ctl: invalid value for '--nice': 99 is not in the range -20<=x<=19\n"
    )
    assert "'WHAT'. Choose from: hosts, vms, " in ctl("get").err
    assert ctl("job", "x").err.startswith("ctl: invalid value for 'ID': 'x' is not an integer; write ctl job")


def test_every_command_reads_all_its_parameters_before_it_complains() -> None:
    import typer

    from controller.ctl.commands import Careful, Group

    root = typer.main.get_command(app)
    context = typer.Context(root)
    seen = []

    def look(group: Group) -> None:
        for name in group.list_commands(context):
            command = group.get_command(context, name)
            seen.append(name)
            if isinstance(command, Group):
                look(command)
            else:
                assert isinstance(command, Careful), name

    assert isinstance(root, Group)
    look(root)
    assert {"broadcast", "push", "suspend"} <= set(seen)


def test_mistakes_are_raised_as_one_and_other_troubles_as_they_are() -> None:
    wrong = Mistakes()
    wrong.check()
    with pytest.raises(CtlError, match="no service"), wrong:
        raise CtlError("no service", ExitStatus.NO_SERVICE)
    for why in ("a", "b", "a"):
        with wrong:
            raise CtlError(why, ExitStatus.USAGE)
    with wrong:  # who made a mistake is told of it, service or not
        raise CtlError("no service", ExitStatus.NO_SERVICE)
    with pytest.raises(KeyError), wrong:
        raise KeyError
    with pytest.raises(CtlError) as caught:
        wrong.check()
    assert (str(caught.value), caught.value.status) == ("a; b", ExitStatus.USAGE)
