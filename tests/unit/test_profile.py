"""The TOML beside an infra.conf: patterns over defaults, and every slip at the path of its key."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from controller.profile import MAX_BYTES, Profile, ProfileError, Settings, load_profile, parse_profile, size_mib

SAMPLE = """\
image = "base.qcow2"
disk = "10G"
bridge = "br0"
apart = ["db-*", "lock-[0-9]"]

[vm."web-*"]
bridge = "br1"
disk = "512 MiB"

[vm."web-1"]
user_data = "web.yaml"

[vm.small]
kernel = "vmlinuz"
initrd = "initrd.gz"
cmdline = "quiet"
"""


def parsed(text: str) -> Profile:
    return parse_profile(text.encode(), folder=Path("/p"))


def refused(text: str | bytes) -> list[str]:
    with pytest.raises(ProfileError) as caught:
        parse_profile(text if isinstance(text, bytes) else text.encode(), file="f")
    return list(caught.value.problems)


def test_later_patterns_are_over_earlier_ones_and_all_over_the_defaults() -> None:
    profile = parsed(SAMPLE)
    base = Settings(image="base.qcow2", disk_mib=10240, bridge="br0")
    assert profile.settings("other") == base
    assert profile.settings("web-0") == Settings(image="base.qcow2", disk_mib=512, bridge="br1")
    assert profile.settings("web-1").user_data == "/p/web.yaml"
    assert profile.settings("WEB-1") == base, "names are told apart by case"


def test_what_boots_is_taken_as_a_whole() -> None:
    small = parsed(SAMPLE).settings("small")
    assert (small.kernel, small.initrd, small.cmdline, small.image) == ("vmlinuz", "initrd.gz", "quiet", None)
    kernel = Settings(kernel="k", initrd="i", cmdline="c")
    assert Settings(image="i").over(kernel) == Settings(image="i")
    assert Settings(kernel="other").over(kernel) == Settings(kernel="other")
    assert Settings(bridge="b").over(kernel) == Settings(kernel="k", initrd="i", cmdline="c", bridge="b")


def test_those_that_stay_apart_are_told_by_the_first_pattern_that_they_match() -> None:
    profile = parsed('apart = ["db-*", "*-1"]')
    assert profile.rules(["db-1", "web-1", "web-2"]) == {"db-1": "db-*", "web-1": "*-1"}


def test_patterns_that_match_nothing_are_known() -> None:
    assert parsed(SAMPLE).unused(["web-0", "db-3"]) == ("web-1", "small", "lock-[0-9]")


def test_a_vm_has_one_interface_the_one_that_was_said_last() -> None:
    profile = parsed("""
        network = "red"
        [vm."web-*"]
        bridge = "br0"
        [vm."web-1"]
        network = "blue"
        """)
    said = [(one.bridge, one.network) for one in map(profile.settings, ("db-0", "web-0", "web-1"))]
    assert said == [(None, "red"), ("br0", None), (None, "blue")]
    assert refused('bridge = "br0"\nnetwork = "red"\n[vm.a]\nnetwork = "Not/one"') == [
        "f: bridge: either a bridge or a network, not both",
        "f: vm.a.network: expected a network of `ctl net`: up to 12 lower-case letters, digits and '-', not 'Not/one'",
    ]


def test_a_file_beside_the_profile_wins_over_an_image_of_that_name(tmp_path: Path) -> None:
    (tmp_path / "base.qcow2").touch()
    (tmp_path / "lab.toml").write_text('image = "base.qcow2"\nkernel = "vmlinuz-on-record"\n')
    profile = load_profile(tmp_path / "lab.toml")
    assert profile.defaults.image == str(tmp_path / "base.qcow2")
    assert profile.defaults.kernel == "vmlinuz-on-record"


CMDLINE = "a kernel's command line of printable ASCII, at most 2047 characters"
KEYS = "image, kernel, initrd, cmdline, bridge, network, user_data, ssh_keys, disk"


def test_all_slips_come_at_once_each_at_its_key() -> None:
    assert refused(
        """
        imgae = "x"
        disk = 10
        bridge = "a bridge"
        apart = "db-*"
        initrd = "i"
        [vm."web-*"]
        kernal = "k"
        disk = "10 bananas"
        cmdline = "größe"
        zzzzzz = 1
        [vm."web-*".nested]
        x = 1
        """
    ) == [
        "f: imgae: no such key; did you mean image?",
        'f: disk: expected a size like "10G" or "512M", up to 1024T, not 10',
        "f: bridge: expected a network interface: 1 to 15 letters, digits, '-', '_' and '.', not 'a bridge'",
        "f: initrd: it goes with a kernel in the same table",
        'f: vm."web-*".kernal: no such key; did you mean kernel?',
        'f: vm."web-*".disk: expected a size like "10G" or "512M", up to 1024T, not \'10 bananas\'',
        f"f: vm.\"web-*\".cmdline: expected {CMDLINE}, not 'größe'",
        f'f: vm."web-*".zzzzzz: no such key; there are {KEYS}',
        'f: vm."web-*".nested: no such key; did you mean initrd?',
        "f: apart: expected a list of patterns of VM names, not 'db-*'",
    ]


@pytest.mark.parametrize(
    ("text", "problem"),
    [
        ("vm = 3", 'f: vm: expected tables like [vm."web-*"], not 3'),
        ("[vm]\nimage = 'x'", "f: vm.image: expected a table [vm.PATTERN] with image in it, not 'x'"),
        ("image = ''", "f: image: expected a file, or the name or digest of an image, not ''"),
        ('image = "a\\u0000"', "f: image: expected a file, or the name or digest of an image, not 'a\\x00'"),
        ("apart = [1]", "f: apart: expected a list of patterns of VM names, not [1]"),
        ("disk = '0G'", 'f: disk: expected a size like "10G" or "512M", up to 1024T, not \'0G\''),
        ("disk = '1025T'", 'f: disk: expected a size like "10G" or "512M", up to 1024T, not \'1025T\''),
        (b"image = '\xff'", "f: byte 9 is not UTF-8; save it as UTF-8 text"),
        (b"x" * (MAX_BYTES + 1), "f: it is longer than 256 KiB"),
    ],
)
def test_one_slip_is_one_problem(text: str | bytes, problem: str) -> None:
    assert refused(text) == [problem]


def test_what_is_no_toml_is_told_with_its_place() -> None:
    (problem,) = refused("image = \n")
    assert problem.startswith("f: ")
    assert "line 1, column 9" in problem


@pytest.mark.parametrize(
    ("text", "size"),
    [("1M", 1), ("512 MiB", 512), ("10G", 10240), ("2TiB", 2097152), ("1024T", 2**30), ("1", None), ("-1G", None)],
)
def test_sizes_are_powers_of_1024(text: str, size: int | None) -> None:
    assert size_mib(text) == size


def survives(data: bytes) -> None:
    """Either ProfileError, with something to say, or a profile that answers."""
    try:
        profile = parse_profile(data)
    except ProfileError as caught:
        problems, text = caught.problems, str(caught)
    else:
        profile.settings("vm1")
        profile.rules(["vm1"])
        profile.unused(["vm1"])
        return
    assert problems
    text.encode()


PIECES = (
    *("image", "kernel", "disk", "apart", "vm", "cmdline", "nothing", '"web-*"', "''", '"x"', "[", "]", "[[", "]]"),
    *(
        "=",
        "=",
        ".",
        ",",
        "{",
        "}",
        "1",
        "1e999",
        "0x1",
        "1979-05-27",
        "true",
        "'10G'",
        "\n",
        "\n",
        "#",
        '"""',
        "\\",
        "\0",
    ),
)


@settings(deadline=None, derandomize=True, max_examples=200)
@given(st.binary() | st.lists(st.sampled_from(PIECES), max_size=30).map(lambda words: " ".join(words).encode()))
def test_no_bytes_raise_anything_but_a_profile_error(data: bytes) -> None:
    survives(data)


@pytest.mark.parametrize("data", [b"a" + b".a" * 100_000 + b"=1", b"x=" + b"[" * 4_000, b"x=[\n" * 3_000])
def test_what_is_nested_or_long_without_end_is_refused(data: bytes) -> None:
    with pytest.raises(ProfileError):
        parse_profile(data)
