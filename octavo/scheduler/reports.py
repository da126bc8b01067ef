"""What the scheduler tells those who look on."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.kv_cache.manager import KVCacheManager, PrefixMatch
from octavo.scheduler.request import Sequence
from octavo.types import BlockUse, PrefixReport


def block_use(cache: KVCacheManager, running: Iterable[Sequence]) -> BlockUse:
    """What the blocks of the running sequences hold; call it when no step is in flight."""
    size = cache.block_size
    num_empty = 0
    unfilled: dict[int, int] = {}  # Empty slots of blocks that siblings may share.
    for seq in running:
        block_ids, num_computed = seq.table.block_ids, seq.num_computed_tokens
        if not seq.request.is_group:
            num_empty += len(block_ids) * size - num_computed
            continue
        for index in range(num_computed // size, len(block_ids)):
            empty = min(size, (index + 1) * size - num_computed)
            unfilled[block_ids[index]] = min(empty, unfilled.get(block_ids[index], size))
    num_empty += sum(unfilled.values())
    num_used = cache.num_referenced_blocks
    return BlockUse(
        num_tokens=num_used * size - num_empty,
        num_empty_slots=num_empty,
        num_shared_blocks=cache.num_shared_blocks,
        num_saved_blocks=cache.num_references - num_used,
        num_copies=cache.num_copies,
    )


def prefix_report(
    cache: KVCacheManager, seq: Sequence, num_cached: int, running: Iterable[Sequence]
) -> PrefixReport:
    """What the prefix cache did for a sequence that is about to start, and why not more.

    Args:
        cache: has given the sequence its blocks.
        seq: is not running yet.
        num_cached: tokens whose blocks were found, in the pool or below it.
        running: all that do.
    """
    found = tuple(seq.table.block_ids[: num_cached // cache.block_size])
    prefix = PrefixMatch(found, num_cached, len(seq.token_ids))
    return PrefixReport(
        request_id=seq.request.request_id,
        index=seq.index,
        num_tokens=len(seq.token_ids),
        num_cached_tokens=num_cached,
        block_size=cache.block_size,
        miss=cache.explain_miss(
            seq.table, seq.token_ids, prefix, (other.table for other in running)
        ),
    )
