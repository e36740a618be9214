"""Chunks as Zstandard frames: what is packed, and what of hostile frames is refused."""

from __future__ import annotations

import itertools
import random
import subprocess
import sys
from pathlib import Path

import pytest
from backports import zstd

from agent.packing import BadFrame, Packer, Unavailable, unpack
from agent.source import gather
from controller.sources import Sources
from protocol.limits import CHUNK, MAX_CHUNK
from protocol.wishes import Wishes

TEXT = (b"a line of a log that says what every line before it said\n" * 2000)[:CHUNK]
NOISE = random.Random(1).randbytes(CHUNK)


def streamed(data: bytes, **options: int) -> bytes:
    """A frame that does not state its size."""
    maker = zstd.ZstdCompressor(
        options={getattr(zstd.CompressionParameter, key): value for key, value in options.items()}
    )
    return maker.compress(data) + maker.flush()


def test_what_is_packed_is_smaller_and_comes_back_whole() -> None:
    frame = Packer().pack(memoryview(TEXT))
    assert frame is not None
    assert len(frame) < CHUNK // 10
    assert unpack(memoryview(frame), CHUNK) == TEXT


@pytest.mark.parametrize("size", [100, CHUNK, MAX_CHUNK])
def test_a_chunk_of_any_size_comes_back_whole(size: int) -> None:
    frame = Packer().pack(bytes(size))
    assert frame is not None
    assert unpack(frame, size) == bytes(size)


def test_a_chunk_that_would_be_a_tenth_smaller_at_most_stays_plain() -> None:
    assert Packer().pack(NOISE) is None
    assert Packer().pack(NOISE[: CHUNK - 2000] + bytes(2000)) is None
    assert Packer().pack(NOISE[: CHUNK // 2] + bytes(CHUNK // 2)) is not None


def test_where_nothing_was_to_be_gained_ever_fewer_chunks_are_tried(monkeypatch: pytest.MonkeyPatch) -> None:
    compress, number = zstd.compress, 0
    tried: list[int] = []

    def counted(blob: bytes, level: int) -> bytes:
        tried.append(number)
        return compress(blob, level)

    monkeypatch.setattr(zstd, "compress", counted)
    packer = Packer()
    while number < 1000:
        assert packer.pack(NOISE) is None
        number += 1
    gaps = [after - before for before, after in itertools.pairwise(tried)]
    assert gaps[:8] == [1, 1, 1, 5, 9, 17, 33, 65]
    assert set(gaps[8:]) == {65}


def test_what_can_be_packed_is_found_again_soon() -> None:
    packer = Packer()
    for _ in range(1000):
        packer.pack(NOISE)
    packed = [packer.pack(TEXT) is not None for _ in range(100)]
    assert packed == [False] * packed.index(True) + [True] * (100 - packed.index(True))


@pytest.mark.parametrize(
    ("frame", "why"),
    [
        (zstd.compress(bytes(64 * CHUNK)), f"states {64 * CHUNK} bytes"),
        (zstd.compress(bytes(CHUNK + 1)), f"states {CHUNK + 1} bytes"),
        (zstd.compress(bytes(CHUNK - 1)), f"states {CHUNK - 1} bytes"),
        (streamed(bytes(CHUNK)), "states None bytes"),
        (streamed(bytes(64 * CHUNK)), "states None bytes"),
        (zstd.compress(TEXT)[:-1], "cut off"),
        (zstd.compress(TEXT)[:20], "cut off"),
        (zstd.compress(TEXT)[:5], "."),
        (b"", "."),
        (b"garbage" * 10, "."),
        (zstd.compress(TEXT)[:12] + b"\xff" * 40, "."),
        (zstd.compress(TEXT) + b"x", "not all that came"),
        (zstd.compress(TEXT) * 2, "not all that came"),
        (zstd.compress(NOISE), "larger than its chunk"),
        (b"\x50\x2a\x4d\x18\x04\x00\x00\x00abcd" + zstd.compress(TEXT), "states"),
    ],
    ids=[
        "bomb",
        "one more",
        "one less",
        "nothing",
        "unstated bomb",
        "cut",
        "cut early",
        "cut in its header",
        "empty",
        "garbage",
        "spoilt",
        "followed",
        "twice",
        "larger",
        "skippable",
    ],
)
def test_a_hostile_frame_is_refused(frame: bytes, why: str) -> None:
    with pytest.raises(BadFrame, match=why):
        unpack(frame, CHUNK)


def test_a_frame_that_states_the_right_size_and_has_more_is_refused() -> None:
    # RFC 8878, 3.1.1: magic, a descriptor (single segment, size in 4 bytes), the size, then blocks.
    def frame(*blocks: tuple[int, int]) -> bytes:
        body = b"\x28\xb5\x2f\xfd\xa0" + CHUNK.to_bytes(4, "little")
        for number, (size, fill) in enumerate(blocks):
            last = number == len(blocks) - 1
            body += (size << 3 | 1 << 1 | last).to_bytes(3, "little") + bytes([fill])
        return body

    assert unpack(frame((CHUNK, 7)), CHUNK) == bytes([7]) * CHUNK
    for wrong in (frame((CHUNK, 7), (CHUNK, 7)), frame(*[(CHUNK, 7)] * 1000), frame((CHUNK - 1, 7))):
        with pytest.raises(BadFrame):
            unpack(wrong, CHUNK)


def test_a_frame_that_wants_a_large_window_is_refused() -> None:
    # RFC 8878, 3.1.1.1.2: not a single segment, size in 4 bytes, and a window of 2 GiB.
    head = b"\x28\xb5\x2f\xfd\x80" + bytes([21 << 3]) + CHUNK.to_bytes(4, "little")
    with pytest.raises(BadFrame):
        unpack(head + (CHUNK << 3 | 1 << 1 | 1).to_bytes(3, "little") + b"\x07", CHUNK)


def test_without_the_library_the_root_sends_plain_and_a_host_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    frame = zstd.compress(TEXT)
    for module in ("backports", "backports.zstd", "compression", "compression.zstd"):
        monkeypatch.setitem(sys.modules, module, None)
    assert Packer().pack(TEXT) is None
    with pytest.raises(Unavailable, match="push with --no-compress"):
        unpack(frame, CHUNK)


def test_the_root_packs_what_a_push_lets_it(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(TEXT * 4)
    for compress in (True, False):
        sources = Sources(tmp_path / f"pushes-{compress}")
        source = gather([(b"file", str(tmp_path / "file"))], Wishes(compress=compress), tmp_path)
        sources.add(1, source)
        blob, packed = sources.read(1, 0)
        assert blob == source.read(0)
        assert (packed is not None) is compress
        sources.drop(1).close()


def test_no_library_is_imported_before_it_is_needed() -> None:
    code = "import sys, agent.bulk, agent.packing, agent.shell; sys.exit('backports.zstd' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
