"""AEGIS-256 into memory of the caller's is what PyNaCl's own functions make, and writes nothing beside it."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from nacl.bindings import crypto_aead_aegis256_decrypt, crypto_aead_aegis256_encrypt

from protocol.aegis import KEY, NONCE, TAG, open_, seal

THE_KEY, THE_NONCE = b"k" * KEY, b"n" * NONCE


def sealed(plain: bytes, ad: bytes) -> bytes:
    room = bytearray(len(plain) + TAG)
    seal(memoryview(plain), ad, THE_NONCE, THE_KEY, memoryview(room))
    return bytes(room)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(plain=st.binary(min_size=1, max_size=2_000), ad=st.binary(max_size=40))
def test_it_is_what_pynacl_makes_and_opens(plain: bytes, ad: bytes) -> None:
    assert sealed(plain, ad) == crypto_aead_aegis256_encrypt(plain, ad, THE_NONCE, THE_KEY)
    assert crypto_aead_aegis256_decrypt(sealed(plain, ad), ad, THE_NONCE, THE_KEY) == plain
    found = open_(memoryview(sealed(plain, ad)), ad, THE_NONCE, THE_KEY)
    assert found is not None
    assert found.readonly
    assert found == plain


def test_nothing_is_written_beside_what_is_sealed() -> None:
    room = bytearray(b"." * 200)
    seal(memoryview(b"x" * 50), b"", THE_NONCE, THE_KEY, memoryview(room)[40:])
    assert room[:40] == b"." * 40
    assert room[40 + 50 + TAG :] == b"." * (160 - 50 - TAG)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(data=st.data())
def test_what_was_altered_does_not_open(data: st.DataObject) -> None:
    good = sealed(b"what is sealed", b"ad")
    at = data.draw(st.integers(0, len(good) - 1))
    bad = bytearray(good)
    bad[at] ^= data.draw(st.integers(1, 255))
    assert open_(memoryview(bad), b"ad", THE_NONCE, THE_KEY) is None
    assert open_(memoryview(good), b"da", THE_NONCE, THE_KEY) is None
    assert open_(memoryview(good), b"ad", b"m" * NONCE, THE_KEY) is None
    assert open_(memoryview(good), b"ad", THE_NONCE, b"l" * KEY) is None


@pytest.mark.parametrize(("nonce", "key", "room"), [(NONCE - 1, KEY, 33), (NONCE, KEY + 1, 33), (NONCE, KEY, 32)])
def test_no_length_is_taken_on_trust(nonce: int, key: int, room: int) -> None:
    with pytest.raises(ValueError, match="another length"):
        seal(memoryview(b"x"), b"", bytes(nonce), bytes(key), memoryview(bytearray(room)))


@pytest.mark.parametrize(("size", "nonce", "key"), [(TAG, NONCE, KEY), (0, NONCE, KEY), (99, 31, KEY), (99, NONCE, 0)])
def test_nor_when_it_is_opened(size: int, nonce: int, key: int) -> None:
    with pytest.raises(ValueError, match="another length"):
        open_(memoryview(bytes(size)), b"", bytes(nonce), bytes(key))
