"""What a model might say at each step of a beam search: the candidates of a beam's next token.

Probabilities fall with the rank as 1 / rank ** s (Zipf), over 1,000 tokens. The exponent s is drawn
evenly from 1 to 4, which makes the mean probability of the first token 0.67 and the mean entropy
1.6 nats: sometimes nearly certain, sometimes open, as a language model is on its own text. Beams of
one request that stand at the same place differ by their last words alone, so they get nearly the
same exponent.
"""

from __future__ import annotations

import math
import random
from functools import cache

from octavo.types import TokenLogprob

VOCABULARY = 1000
NUM_EXPONENTS = 64
JITTER = 6
"""By how many of the exponents beams at one place may differ."""
_PLACE = 40_503
"""Any odd number: spreads neighbouring places over the exponents."""


@cache
def _candidates(count: int, at: int) -> TokenLogprob:
    """The `count` most probable tokens with the exponent number `at`."""
    exponent = 1 + 3 * at / (NUM_EXPONENTS - 1)
    total = math.log(sum(rank**-exponent for rank in range(1, VOCABULARY + 1)))
    top = tuple((rank, -exponent * math.log(rank) - total) for rank in range(1, count + 1))
    return TokenLogprob(*top[0], top)


def next_tokens(rng: random.Random, place: int, count: int) -> TokenLogprob:
    """Candidates for the token at a place."""
    at = (place * _PLACE >> 3) % NUM_EXPONENTS + rng.randint(-JITTER, JITTER)
    return _candidates(count, min(max(at, 0), NUM_EXPONENTS - 1))
