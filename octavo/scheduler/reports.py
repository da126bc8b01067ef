"""What the scheduler tells those who look on."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.kv_cache.manager import KVCacheManager, PrefixMatch
from octavo.scheduler.request import Sequence
from octavo.types import PrefixReport


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
