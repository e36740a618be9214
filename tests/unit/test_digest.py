"""Digests of content are BLAKE3's, whatever the parts that they are made of."""

from __future__ import annotations

import subprocess
import sys

from hypothesis import given, settings
from hypothesis import strategies as st

from protocol.digest import SIZE, content_digest, digester


def test_the_digest_of_nothing_is_that_of_blake3() -> None:
    # The first of the test vectors that its authors publish (test_vectors/test_vectors.json, input_len 0).
    assert content_digest(b"").hex() == "af1349b9f5f9a1a6a0404dea36dcc9499bcb25c9adc112b7cc9a93cae41f3262"
    assert len(content_digest(b"")) == SIZE


@settings(derandomize=True, deadline=None, max_examples=50)
@given(parts=st.lists(st.binary(max_size=3_000), max_size=5))
def test_it_is_the_same_in_parts(parts: list[bytes]) -> None:
    found = digester()
    for part in parts:
        found.update(memoryview(part))
    assert found.digest() == content_digest(b"".join(parts))


def test_an_agent_that_has_no_push_does_without() -> None:
    code = "import sys, agent.__main__; sys.exit('blake3' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
