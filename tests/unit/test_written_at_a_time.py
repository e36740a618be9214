"""How much a host writes at a time, beside what may wait for its disk."""

from __future__ import annotations

import pytest

from agent.pushes import written_most
from protocol.limits import CHUNK, CHUNK_LARGE, MAX_CHUNK, UNSTORED_MOST


@pytest.mark.parametrize("chunk", [CHUNK, 2 * CHUNK, CHUNK_LARGE, 2 * CHUNK_LARGE, MAX_CHUNK])
def test_while_one_batch_is_written_the_next_can_come_whatever_the_chunks_size(chunk: int) -> None:
    assert 2 * written_most(chunk) * chunk <= UNSTORED_MOST
