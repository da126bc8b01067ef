"""What the scheduler tells those who look on."""

from __future__ import annotations

from collections.abc import Iterable

from octavo.kv_cache.manager import KVCacheManager, PrefixMatch
from octavo.scheduler.request import Sequence
from octavo.types import PrefixReport


def prefix_report(
    cache: KVCacheManager, seq: Sequence, prefix: PrefixMatch, running: Iterable[Sequence]
) -> PrefixReport:
    """What the prefix cache did for a sequence that is about to start, and why not more."""
    return PrefixReport(
        request_id=seq.request.request_id,
        index=seq.index,
        num_tokens=len(seq.token_ids),
        num_cached_tokens=prefix.num_tokens,
        block_size=cache.block_size,
        miss=cache.explain_miss(
            seq.table, seq.token_ids, prefix, (other.table for other in running)
        ),
    )
