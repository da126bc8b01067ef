"""The hash chain: a name for a prefix, from its first token on."""

from __future__ import annotations

from array import array
from hashlib import sha256

import pytest

from octavo.kv_cache.prefix import extend_chain, root_hash


def chain(token_ids: list[int], *, salt: str = "", block_size: int = 2) -> list[bytes]:
    hashes: list[bytes] = []
    num_blocks = len(token_ids) // block_size
    extend_chain(hashes, root_hash(salt), array("i", token_ids), block_size, num_blocks)
    return hashes


def test_each_hash_covers_the_parent_and_the_tokens_of_the_block() -> None:
    (first, second) = chain([1, 2, 3, 4])
    assert first == sha256(root_hash("") + array("i", [1, 2]).tobytes()).digest()
    assert second == sha256(first + array("i", [3, 4]).tobytes()).digest()


def test_equal_blocks_after_different_beginnings_have_different_names() -> None:
    assert chain([1, 2, 7, 8])[1] != chain([3, 4, 7, 8])[1]
    assert chain([1, 2, 7, 8])[0] == chain([1, 2, 9, 9])[0]


def test_the_salt_separates_equal_prefixes() -> None:
    assert set(chain([1, 2, 3, 4], salt="a")).isdisjoint(chain([1, 2, 3, 4], salt="b"))


def test_no_two_lists_of_parts_have_one_root() -> None:
    lists = [(), ("",), ("", ""), ("a",), ("a", ""), ("", "a"), ("ab",), ("a", "b"), ("é",)]
    assert len({root_hash(*parts) for parts in lists}) == len(lists)


def test_a_name_is_the_same_in_every_version() -> None:
    """It is the name of blocks on disk: a change must be a decision."""
    assert root_hash("model", "0", "", "").hex()[:16] == "5adac39f7b3033b0"


def test_extending_in_steps_gives_the_same_chain() -> None:
    token_ids = array("i", range(20))
    hashes: list[bytes] = []
    for num_blocks in (1, 1, 3, 5):
        extend_chain(hashes, root_hash(""), token_ids, 4, num_blocks)
        assert len(hashes) == num_blocks
    assert hashes == chain(list(range(20)), block_size=4)


def test_a_block_that_is_not_full_has_no_name() -> None:
    with pytest.raises(AssertionError):
        extend_chain([], root_hash(""), array("i", [1, 2, 3]), 2, 2)
