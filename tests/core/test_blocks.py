"""Blocks: what is not exactly the block that was asked for is refused."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from paceline.core import blocks
from paceline.core.blocks import BlockError

SPACE = bytes(range(32))
TOKENS = [5, 1, 7, 2**31 - 1, 0, 3, 3, 9]


def links(tokens=TOKENS, salt="", space=SPACE, size=4):
    return list(blocks.chain(space, salt, tokens, size))


def test_a_block_comes_back_as_it_was():
    payload = np.arange(100, dtype=np.uint8)
    for link in links():
        raw = blocks.encode(SPACE, link, payload)
        assert len(raw) == blocks.size(4, 100)
        assert bytes(blocks.decode(SPACE, link, raw, 100)) == payload.tobytes()


def test_a_chain_may_be_built_page_by_page():
    a, b = links()
    assert blocks.first(SPACE, "", TOKENS[:4]) == a
    assert a.next(TOKENS[4:]) == b
    assert (a.index, b.index) == (0, 1)
    assert len(links(TOKENS[:7])) == 1  # whole pages only
    assert links([]) == []


def test_every_damaged_byte_is_noticed():
    link = links()[1]
    raw = blocks.encode(SPACE, link, b"some payload")
    for i in range(len(raw)):
        for bit in (1, 128):
            bad = bytearray(raw)
            bad[i] ^= bit
            with pytest.raises(BlockError):
                blocks.decode(SPACE, link, bytes(bad), 12)


@given(st.integers(0, 400), st.randoms(use_true_random=False))
def test_truncated_lengthened_and_random_bytes_are_refused(n: int, rng: random.Random):
    link = links()[0]
    raw = blocks.encode(SPACE, link, b"some payload")
    if n != len(raw):
        with pytest.raises(BlockError):
            blocks.decode(SPACE, link, (raw + bytes(400))[:n], 12)
    with pytest.raises(BlockError):
        blocks.decode(SPACE, link, rng.randbytes(n), 12)
    with pytest.raises(BlockError):
        blocks.decode(SPACE, link, rng.randbytes(len(raw)), 12)


def test_another_model_identity_text_or_size_is_refused():
    mine = links()[1]
    others = [
        (bytes(32), links(space=bytes(32))[1], b"some payload"),
        (SPACE, links(salt="b")[1], b"some payload"),
        (SPACE, links([6, *TOKENS[1:]])[1], b"some payload"),  # the same page behind another
        (SPACE, links()[0], b"some payload"),
        (SPACE, mine, b"another length"),
    ]
    for space, link, payload in others:
        with pytest.raises(BlockError):
            blocks.decode(SPACE, mine, blocks.encode(space, link, payload), 12)


def test_tokens_are_compared_and_not_only_their_hash():
    """A block whose key is right and whose tokens are not, checksum and all: what a hash collision would give."""
    link = links()[0]
    liar = blocks.Link(link.key, link.parent, bytes(16), 0)
    with pytest.raises(BlockError, match="other tokens"):
        blocks.decode(SPACE, link, blocks.encode(SPACE, liar, b"some payload"), 12)


def test_salts_never_meet():
    texts = [TOKENS, TOKENS[:4], [0] * 8]
    keys = [x.key for salt in ("", "a", "b", "ab", "\0a", "ä", "\ud800") for text in texts for x in links(text, salt)]
    assert len(set(keys)) == 7 * 4  # of the texts two share a page
    assert blocks.owner(SPACE, "a") != blocks.owner(SPACE, "b")
    assert all(x.key.startswith(blocks.owner(SPACE, "a")) for x in links(salt="a"))
