"""Sets of hosts: what people may write, what they read, and what is refused rather than guessed."""

from __future__ import annotations

import subprocess
import sys

import pytest
from ClusterShell.NodeSet import RESOLVER_NOGROUP, NodeSet
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.hosts import expand, fold, names_in, site_of
from controller.status import CtlError, ExitStatus


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("h3", ["h3"]),
        ("h[0-3]", ["h0", "h1", "h2", "h3"]),
        ("h[01-03],a", ["a", "h01", "h02", "h03"]),
        ("h[0-3]!h2", ["h0", "h1", "h3"]),
        ("suno-[3,6].sophia.grid5000.fr", ["suno-3.sophia.grid5000.fr", "suno-6.sophia.grid5000.fr"]),
        (" h1 ", ["h1"]),
        ("h1!h1", []),
        ("", []),
    ],
)
def test_ranges_lists_and_differences_are_expanded(text: str, names: list[str]) -> None:
    assert list(expand(text)) == names


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("@rack1", "neither groups nor wildcards"),
        ("@*", "neither groups nor wildcards"),
        ("h1,@all", "neither groups nor wildcards"),
        ("h*", "neither groups nor wildcards"),
        ("h[3-1]", "3-1"),
        ("h[1-", "bracket"),
        ("h[0-3] h7", "is no host name"),
        ("h1;reboot", "is no host name"),
        ("-x", "is no host name"),
        ("h[0-999999999]", "more than the 65536 hosts"),
        ("h[0-999]r[0-999]", "names 1000000 hosts"),
        ("h" * 100_000, "is no host name"),
    ],
)
def test_what_is_no_set_of_hosts_is_refused_with_its_reason(text: str, why: str) -> None:
    with pytest.raises(CtlError) as caught:
        expand(text)
    assert why in str(caught.value)
    assert len(str(caught.value)) < 400
    assert caught.value.status == ExitStatus.USAGE


def test_no_groups_come_from_this_machine() -> None:
    # ClusterShell ships an example whose group `*` has 131 nodes, and reads group files of the machine it is on.
    with pytest.raises(CtlError):
        expand("@*")
    with pytest.raises(CtlError):
        expand("h[0-3]&@compute")


def test_folding_says_many_names_in_few_words() -> None:
    assert fold([]) == ""
    assert fold(["h3"]) == "h3"
    assert fold(["h3", "h3"]) == "h3"
    assert fold(["h2", "h0", "h1", "h7"]) == "h[0-2,7]"
    assert fold([f"suno-{n}.sophia" for n in range(100)]) == "suno-[0-99].sophia"


@given(st.sets(st.from_regex(r"[a-z]{1,3}[0-9]{0,3}", fullmatch=True), min_size=1, max_size=30))
def test_what_is_folded_expands_to_the_same_hosts(names: set[str]) -> None:
    assert set(expand(fold(names))) == names


@given(
    st.from_regex(r"[A-Za-z][A-Za-z_-]{0,4}", fullmatch=True),
    st.sampled_from(["", ".lab", ".sophia.grid5000.fr", ".r2", ".007.x", ".a-3-b"]),
    st.sets(st.one_of(st.integers(0, 30), st.integers(0, 10**10)), min_size=2, max_size=30),
)
@settings(derandomize=True, deadline=None)
def test_hosts_that_differ_in_a_number_are_folded_as_clustershell_does(
    prefix: str, domain: str, numbers: set[int]
) -> None:
    names = [f"{prefix}{number}{domain}" for number in numbers]
    assert fold(names) == str(NodeSet.fromlist(names, resolver=RESOLVER_NOGROUP))


def test_the_usual_hosts_cost_no_clustershell() -> None:
    script = (
        "import sys; from controller.hosts import expand, fold; expand('h3.site'); fold(['h3']);"
        " assert fold(['n-3.grid5000.fr', 'n-5.grid5000.fr', 'n-4.grid5000.fr']) == 'n-[3-5].grid5000.fr';"
        " sys.exit('ClusterShell' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False, timeout=60).returncode == 0


def test_an_oar_node_file_names_each_host_once() -> None:
    text = "\ufeffsuno-3.sophia\nsuno-3.sophia\r\n\n# reserved until 18:00\nsuno-[6-7].sophia # two\nsuno-3.sophia"
    assert names_in(text, file="nodes") == ("suno-3.sophia", "suno-6.sophia", "suno-7.sophia")


def test_a_slip_in_a_file_of_hosts_is_told_with_its_line() -> None:
    with pytest.raises(CtlError, match=r"^nodes:2: host set 'h\[3-1\]'"):
        names_in("h1\nh[3-1]\n", file="nodes")


@pytest.mark.parametrize(
    ("name", "site"),
    [
        ("suno-3.sophia.grid5000.fr", "sophia"),
        ("suno-3.sophia", "sophia"),
        ("h3", ""),
        ("198.18.0.1", ""),
        ("", ""),
    ],
)
def test_a_site_is_what_follows_the_host_in_its_name(name: str, site: str) -> None:
    assert site_of(name) == site
