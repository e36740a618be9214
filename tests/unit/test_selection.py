"""Which hosts are meant: groups of all sources, labels, set operators, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller import labels
from controller.groups import read_groups
from controller.selection import EVERYBODY, Chooser, Selection
from controller.status import CtlError, ExitStatus


@dataclass(frozen=True)
class Host:
    name: str
    site: str = ""
    labels: Mapping[str, str] = field(default_factory=dict)


FLEET = (
    *(Host(f"h{n}", "sophia", {"rack": "1", "gpu": "yes"}) for n in range(4)),
    *(Host(f"h{n}", "rennes", {"rack": "2"}) for n in range(4, 8)),
    Host("lone"),
)


@dataclass
class Known:
    """What a service would say."""

    hosts: Sequence[Host] = FLEET
    runs: bool = True
    asked: int = 0

    def members(self) -> Sequence[Host]:
        self.asked += 1
        if not self.runs:
            raise CtlError("no service runs", ExitStatus.NO_SERVICE)
        return self.hosts

    def failed(self, job: int | None) -> Sequence[str]:
        return ("h1", "h5") if job is None else (f"h{job}",)


@pytest.fixture(autouse=True)
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with no groups on it but those that a test makes."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    # Its own list begins with /etc/clustershell, of whatever machine this is.
    monkeypatch.setattr("ClusterShell.Defaults.config_paths", lambda name: [str(tmp_path / "cs" / name)])
    return tmp_path


def chooser(home: Path, known: Known | None = None) -> Chooser:
    return Chooser(known or Known(), lambda: home)


def write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def chosen(home: Path, **asked: object) -> str:
    found = chooser(home).choose(Selection(**asked))  # type: ignore[arg-type]  # a test says what is asked
    assert found is not None
    return " ".join(found)


# --- where groups come from -------------------------------------------------------------------------------------------


def test_groups_come_from_files_of_ones_own_and_the_fleets_file_wins(home: Path) -> None:
    write(home / "groups.toml", 'rack1 = "h[0-1]"\nboth = ["@rack1", "h7"]\n')
    write(home / "config/canopy/groups.toml", 'rack1 = "h6"\nodd = "h[1,3]"\n')
    assert chosen(home, where=("@rack1",)) == "h0 h1"
    assert chosen(home, where=("@both",)) == "h0 h1 h7"
    assert chosen(home, where=("@odd&@rack1",)) == "h1"


def test_groups_come_from_clustershells_own_files(home: Path) -> None:
    write(home / "cs/groups.conf", f"[Main]\ndefault: racks\nconfdir: {home}/cs/conf\nautodir: {home}/cs/groups.d\n")
    write(home / "cs/groups.d/racks.yaml", "racks:\n  r1: 'h[0-2]'\n  r2: '@r1,h5'\nroles:\n  login: h7\n")
    write(home / "cs/conf/up.conf", "[up]\nmap: echo h[4-6]\nlist: echo $GROUP\n")
    assert chosen(home, where=("@r2",)) == "h0 h1 h2 h5"
    assert chosen(home, where=("@roles:login,@r1",)) == "h0 h1 h2 h7"
    assert chosen(home, where=("@up:any!h5",)) == "h4 h6"
    assert chosen(home, where=("@racks:*",)) == "h0 h1 h2 h5"


def test_groups_come_from_what_the_service_knows(home: Path) -> None:
    assert chosen(home, where=("@sophia",)) == "h0 h1 h2 h3"
    assert chosen(home, where=("@site:rennes!h[4-5]",)) == "h6 h7"
    assert chosen(home, where=("@failed",)) == "h1 h5"
    assert chosen(home, where=("@failed:17",)) == "h17"
    assert chosen(home, where=("@label:rack=2",)) == "h4 h5 h6 h7"
    assert chosen(home, where=("@all!@sophia",)) == "h4 h5 h6 h7 lone"
    assert chosen(home, where=("@*",)) == " ".join(host.name for host in FLEET)
    assert chosen(home, where=("h[0-3]^@failed",)) == "h0 h2 h3 h5"
    assert chosen(home, where=("l*",)) == "lone"


def test_a_file_of_ones_own_needs_no_service(home: Path) -> None:
    write(home / "groups.toml", 'rack1 = "h[0-1]"\n')
    known = Known(runs=False)
    assert chooser(home, known).choose(Selection(where=("@rack1",))) == ("h0", "h1")
    assert not known.asked
    with pytest.raises(CtlError) as caught:
        chooser(home, known).choose(Selection(where=("@all",)))
    assert caught.value.status == ExitStatus.NO_SERVICE


def test_plain_names_ask_nobody(home: Path) -> None:
    known = Known()
    assert chooser(home, known).choose(Selection(where=("h1", "new"), exclude=("h1",))) == ("new",)
    assert not known.asked


def test_the_names_of_groups_are_known(home: Path) -> None:
    write(home / "groups.toml", 'rack1 = "h[0-1]"\n')
    write(home / "cs/groups.conf", f"[Main]\ndefault: racks\nautodir: {home}/cs/groups.d\n")
    write(home / "cs/groups.d/racks.yaml", "racks:\n  r1: 'h[0-2]'\n")
    assert chooser(home).groups.names() == ["rack1", "r1", "rennes", "sophia", "all", "failed", "racks:r1"]


def test_hosts_are_named_by_the_groups_that_they_make_up(home: Path) -> None:
    write(home / "groups.toml", 'rack1 = "h[0-1]"\n')
    assert chooser(home).regroup(["h0", "h1", "lone"]) == "@rack1,lone"
    assert chooser(home).regroup([f"h{n}" for n in range(5)]) == "@sophia,h4"
    assert chooser(home).regroup(["h0", "lone"]) == "h0,lone"


# --- how they come together -------------------------------------------------------------------------------------------


def test_options_add_narrow_and_leave_out(home: Path) -> None:
    write(home / "groups.toml", 'r1 = "h[0-1]"\nr2 = "h[2-3]"\nr3 = "h[4-5]"\n')
    assert chosen(home, groups=("r1,@r3",)) == "h0 h1 h4 h5"
    assert chosen(home, groups=("r[1,3]",)) == "h0 h1 h4 h5"
    assert chosen(home, groups=("r1",), where=("lone",), exclude=("h0",)) == "lone h1"
    assert chosen(home, everybody=True, exclude_groups=("r1", "r2"), exclude=("lone",)) == "h4 h5 h6 h7"
    assert chosen(home, labels=("rack=1", "gpu=yes"), exclude=("h0",)) == "h1 h2 h3"
    assert chosen(home, labels=("rack=1,gpu=yes",), where=("h[3-5]",)) == "h3"


def test_hosts_come_from_files_with_groups_in_them(home: Path) -> None:
    write(home / "nodes", "h1\n@sophia!h[0-2]  # one\nlone\n")
    assert chosen(home, hostfile=(str(home / "nodes"),)) == "h1 h3 lone"


def test_some_are_picked_and_never_more_than_there_are(home: Path) -> None:
    picked = chosen(home, labels=("rack=1",), pick=2).split()
    assert len(picked) == 2
    assert set(picked) < {"h0", "h1", "h2", "h3"}
    assert picked == sorted(picked)
    assert chosen(home, where=("h[0-2]",), pick=9) == "h0 h1 h2"


def test_nothing_said_is_the_whole_fleet(home: Path) -> None:
    assert chooser(home).choose(EVERYBODY) is None
    assert not EVERYBODY


@pytest.mark.parametrize(
    "asked",
    [
        {"where": ("",)},
        {"where": ("h1!h1",)},
        {"where": ("h1",), "exclude": ("h[0-9]",)},
        {"exclude": ("@all",)},
        {"labels": ("rack=9",)},
        {"where": ("@sophia&@rennes",)},
        {"where": ("x*",)},
        {"groups": ("sophia",), "exclude_groups": ("sophia",)},
    ],
)
def test_an_empty_selection_is_an_error_and_never_all(home: Path, asked: dict[str, tuple[str, ...]]) -> None:
    with pytest.raises(CtlError, match=r"no host (matches|has the label)") as caught:
        chosen(home, **asked)
    assert caught.value.status == ExitStatus.NO_TARGET


@given(
    st.lists(
        st.sampled_from(["@sophia", "@rennes", "h[0-9]", "lone", "@failed", "@label:rack=2"]), min_size=2, max_size=5
    ),
    st.lists(st.sampled_from(",!&^"), min_size=4, max_size=4),
)
@settings(derandomize=True, deadline=None, max_examples=60)
def test_set_operators_mean_what_they_mean_for_sets(names: list[str], operators: list[str]) -> None:
    values = {
        "@sophia": {"h0", "h1", "h2", "h3"},
        "@rennes": {"h4", "h5", "h6", "h7"},
        "h[0-9]": {f"h{n}" for n in range(10)},
        "lone": {"lone"},
        "@failed": {"h1", "h5"},
        "@label:rack=2": {"h4", "h5", "h6", "h7"},
    }
    text, expected = names[0], set(values[names[0]])
    for sign, name in zip(operators, names[1:], strict=False):
        text += sign + name
        other = values[name]
        expected = {",": expected | other, "!": expected - other, "&": expected & other, "^": expected ^ other}[sign]
    assert set(chooser(Path("/nowhere")).expand(text)) == expected


# --- what is refused --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("where", "why"),
    [
        ("@rack", "there is no group @rack: the nearest is @rack1"),
        ("@sofia", "there is no group @sofia: the nearest is @sophia"),
        ("h1,@zzz", "there is no group @zzz: there are @rack1, @loop, @pool, @bad, "),
        ("@site:paris", "there is no group @site:paris: there are @site:rennes, @site:sophia"),
        ("@site:sofia", "the nearest is @site:sophia"),
        ("@rack2", "there is no group @rack2: there are @rack1, "),
        ("@label:rack=9", "no host has the label rack=9: there are rack=1, rack=2"),
        ("@slurm:x", "there is no group @slurm:x"),
        ("@failed:x", "there is no group @failed:x"),
        ("@", "there is no group @"),
        ("@label:rak=1", "no host has a label rak: the nearest is rack"),
        ("@label:rack", "give a label as key=value"),
        ("@loop", "groups go in a circle: @loop -> @pool -> @loop"),
        ("@bad", "group @bad"),
        ("@sophia,h[3-1]", "3-1"),
        ("@sophia,h1;reboot", "is no host name"),
        ("^hosts.txt", "--hostfile FILE"),
        ("h1,^/etc/hosts.txt", "--hostfile FILE"),
    ],
)
def test_what_can_not_be_meant_is_an_error_that_helps(home: Path, where: str, why: str) -> None:
    write(home / "groups.toml", 'rack1 = "h[0-1]"\nloop = "@pool"\npool = "h1,@loop"\nbad = "h[1-"\n')
    with pytest.raises(CtlError) as caught:
        chosen(home, where=(where,))
    assert why in str(caught.value)


def test_all_that_is_wrong_is_told_at_once(home: Path) -> None:
    with pytest.raises(CtlError) as caught:
        chosen(home, where=("@nix", "h[3-1]", "h1;x"))
    assert all(word in str(caught.value) for word in ("@nix", "3-1", "h1;x"))


def test_a_file_of_groups_is_wrong_in_all_its_places_at_once() -> None:
    with pytest.raises(CtlError) as caught:
        read_groups('"a b" = "h1"\nall = "h1"\nempty = ""\nnumber = 3\nlist = [1]\ngood = "h1"\n', file="groups.toml")
    told = str(caught.value)
    assert told.startswith("groups.toml: 'a b' is no name")
    assert all(f"{name} " in told for name in ("all", "empty", "number", "list"))
    assert "good" not in told
    assert caught.value.status == ExitStatus.USAGE


def test_a_file_that_is_no_toml_is_told_with_its_line() -> None:
    with pytest.raises(CtlError, match=r"groups\.toml: .*line 2"):
        read_groups('a = "h1"\nb = \n', file="groups.toml")


def test_a_group_of_everybodys_hosts_is_no_way_around_the_limit(home: Path) -> None:
    write(home / "groups.toml", 'huge = "h[0-999999999]"\n')
    with pytest.raises(CtlError, match="more than the 65536 hosts"):
        chosen(home, where=("@huge",))


# --- labels -----------------------------------------------------------------------------------------------------------


def test_a_change_of_labels_gives_and_takes_away() -> None:
    assert labels.parse(["rack=1", "gpu-", "a.b/c=", "x=y-z"]) == ({"rack": "1", "a.b/c": "", "x": "y-z"}, ["gpu"])


@pytest.mark.parametrize(
    "word", ["rack", "=1", "-", "a b=1", "a=b c", "a=b=c", "a,b=1", "a=@x", "ä=1", "k" * 64 + "=1"]
)
def test_what_is_no_label_is_refused(word: str) -> None:
    with pytest.raises(CtlError) as caught:
        labels.parse([word, "also bad"])
    assert "also bad" in str(caught.value), "all of it at once"
    assert caught.value.status == ExitStatus.USAGE


def test_a_label_is_not_given_and_taken_away_at_once() -> None:
    with pytest.raises(CtlError, match="both"):
        labels.parse(["a=1", "a-"])
