"""The records that cross a layer or a process: frozen, slotted, typed, msgpack-ready.

They hold token ids, numbers and text, never tensors; this module imports only msgspec, so the HTTP
process stays free of numpy. Records that carry arrays live in `graph/batch.py`.
"""

from __future__ import annotations

from typing import Literal

import msgspec

FinishReason = Literal["stop", "length", "abort", "error"]
MissReason = Literal[
    "cache off",
    "shorter than a block",
    "never seen",
    "being computed",
    "evicted",
    "reset",
    "discarded",
    "other salt or scope",
]
"""Why a prefix was not served: "being computed" by a sequence that runs; "discarded" since that
sequence's logits were not finite."""


class SamplingParams(msgspec.Struct, frozen=True, kw_only=True):
    """How the tokens of one request are chosen; fields and defaults are vLLM's.

    Attributes:
        n: how many sequences to return: independent samples, or the best beams.
        best_of: how many to sample, of which the n with the greatest mean log probability are
            returned, or how many beams to search with; None means n.
        use_beam_search: search for the most probable sequences instead of sampling.
        length_penalty: beams are ranked by their log probability / length ** length_penalty.
        early_stopping: end a beam search as soon as `best_of` beams have ended (True), when no
            better one is likely (False) or when none is possible ("never"); as in transformers.
        temperature: 0 is greedy; otherwise logits are divided by it.
        top_k: keep the k most probable tokens; 0 or -1 keeps all.
        top_p: keep the smallest set of tokens whose probability reaches this.
        min_p: keep tokens at least this fraction as probable as the most probable one.
        seed: makes sampling reproducible; None takes a fresh one.
        repetition_penalty: divides positive and multiplies negative logits of tokens seen in
            prompt or output.
        presence_penalty: subtracted once from the logit of each token in the output.
        frequency_penalty: subtracted from the logit of a token as often as it stands in the output.
        stop: strings that end the text; not part of it unless include_stop_str_in_output.
        stop_token_ids: token ids that end the text.
        ignore_eos: go on past the model's end-of-text tokens.
        min_tokens: neither end-of-text nor a stop token is sampled before so many.
        max_tokens: the most tokens to sample; None means up to the context length.
        logprobs: how many alternatives to report for each token (0: the sampled one alone); None
            reports none.
        logit_bias: added to the logits of these token ids.
        skip_special_tokens: leave special tokens out of the text.
    """

    n: int = 1
    best_of: int | None = None
    use_beam_search: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int | None = None
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    include_stop_str_in_output: bool = False
    ignore_eos: bool = False
    min_tokens: int = 0
    max_tokens: int | None = 16
    logprobs: int | None = None
    logit_bias: dict[int, float] = {}
    skip_special_tokens: bool = True

    @property
    def num_sequences(self) -> int:
        """How many sequences are computed at a time."""
        return self.n if self.best_of is None else self.best_of


class BeamSearchParams(msgspec.Struct, frozen=True, kw_only=True):
    """How `LLM.beam_search` searches; fields are vLLM's, `early_stopping` is transformers'."""

    beam_width: int
    max_tokens: int
    ignore_eos: bool = False
    length_penalty: float = 1.0
    early_stopping: bool | Literal["never"] = False


class BeamSearchSequence(msgspec.Struct, frozen=True, kw_only=True):
    """One of the best beams.

    Attributes:
        text: of the answer, without the prompt.
        token_ids: of the answer.
        cum_logprob: the sum of their log probabilities; beams are in the order of cum_logprob /
            len(token_ids) ** length_penalty, best first.
    """

    text: str
    token_ids: tuple[int, ...]
    cum_logprob: float
    finish_reason: FinishReason


class BeamSearchOutput(msgspec.Struct, frozen=True, kw_only=True):
    """What `LLM.beam_search` found for one prompt: `beam_width` sequences, best first."""

    sequences: list[BeamSearchSequence]


class CacheParams(msgspec.Struct, frozen=True, kw_only=True):
    """What a request asks of the prefix cache. None of it changes the answer.

    Attributes:
        salt: the client's own: only requests with an equal one share blocks; "" is none.
        scope: the server's, from the API key: the same rule; "" is none.
        pin_s: for so many seconds from the first token on, the prompt's full blocks stay cached.
    """

    salt: str = ""
    scope: str = ""
    pin_s: float = 0.0


OPEN_CACHE = CacheParams()
"""Share with everybody who gives neither, and stay as long as there is room."""


class EngineRequest(msgspec.Struct, frozen=True, kw_only=True):
    """One request as the engine sees it: ids, no text.

    Attributes:
        request_id: unique among the requests alive.
        prompt_ids: at least one token id.
        params: complete: max_tokens and seed are set, `stop_token_ids` are the user's own.
        priority: smaller runs first under the priority policy; equal ones in order of arrival.
        client: whom it is for: under the policy "fair" clients take turns.
        cache: who may share its blocks, and how long they stay.
    """

    request_id: str
    prompt_ids: list[int]
    params: SamplingParams
    priority: int = 0
    client: str = ""
    cache: CacheParams = OPEN_CACHE


class TokenLogprob(msgspec.Struct, frozen=True, array_like=True):
    """Log probabilities at one sampled position, from the raw logits (before penalties)."""

    token_id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    """The most probable (token_id, logprob), best first."""


class TokenUpdate(msgspec.Struct, frozen=True, array_like=True):
    """What one step added to one sequence.

    Attributes:
        token_ids: 0 to k+1 new ids, a stop token included.
        logprobs: one per id if asked for, else empty.
        finish_reason: set in the last update of the sequence and in no other.
        stop_token_id: the id that ended it, if one of stop_token_ids did.
        num_cached_tokens: prompt tokens that the prefix cache served.
    """

    request_id: str
    index: int
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_token_id: int | None = None
    num_cached_tokens: int = 0


class KVPool(msgspec.Struct, frozen=True, kw_only=True):
    """The memory that holds the K and V of all sequences."""

    num_blocks: int
    block_size: int
    """Tokens a block."""
    num_bytes: int
    identity: str = ""
    """Names all that the bytes of a block depend on beside its tokens and those before: weights,
    quantization, backend, form of the block. Blocks of equal identity are interchangeable."""


class Capacity(msgspec.Struct, frozen=True, kw_only=True):
    """What an engine can hold, known once its model is loaded."""

    model: str
    architecture: str
    num_parameters: int
    max_model_len: int
    kv_pool: KVPool
    weights_bytes: int
    vocab_size: int
    backend: str
    """Name and details for people, such as "cpu avx512 2 threads"."""


class TierStats(msgspec.Struct, frozen=True, kw_only=True):
    """A tier below the KV pool, a snapshot; zeros where there is none."""

    num_bytes: int = 0
    num_blocks: int = 0
    num_hits: int = 0
    """Blocks that came back from it."""
    num_writes: int = 0
    num_drops: int = 0
    """Blocks that were not kept because too many waited to be written."""
    num_corrupt: int = 0
    """Blocks whose bytes were no longer those that were written."""


class LowerStats(msgspec.Struct, frozen=True, kw_only=True):
    """The tiers below the KV pool."""

    host: TierStats = TierStats()
    disk: TierStats = TierStats()


class BlockUse(msgspec.Struct, frozen=True, kw_only=True):
    """What the used blocks of the KV pool hold, a snapshot."""

    num_tokens: int = 0
    """Tokens whose K and V lie in them; those of a shared block count once."""
    num_empty_slots: int = 0
    """Slots that are reserved for a sequence's next tokens."""
    num_shared_blocks: int = 0
    """Blocks that more than one sequence refers to."""
    num_saved_blocks: int = 0
    """How many more there would be if nothing were shared."""
    num_copies: int = 0
    """Blocks copied since the start because a sequence wrote into one that others held too."""


class CacheStats(msgspec.Struct, frozen=True, kw_only=True):
    """The KV pool and its prefix cache, a snapshot."""

    num_blocks: int = 0
    num_blocks_used: int = 0
    """Blocks that a living sequence refers to."""
    num_blocks_cached: int = 0
    """Free blocks whose content the prefix cache can still serve."""
    use: BlockUse = BlockUse()
    num_blocks_pinned: int = 0
    """Blocks that stay cached for a time because a request asked for it."""
    num_queries: int = 0
    """Prompt tokens that the prefix cache looked up."""
    num_hits: int = 0
    """Prompt tokens that the prefix cache served, also from below the pool."""
    lower: LowerStats = LowerStats()


class EngineStats(msgspec.Struct, frozen=True, kw_only=True):
    """Gauges and monotonic counters of one engine, a snapshot."""

    num_running: int = 0
    num_waiting: int = 0
    cache: CacheStats = CacheStats()
    num_preemptions: int = 0
    prompt_tokens: int = 0
    generation_tokens: int = 0
    num_steps: int = 0
    step_time_s: float = 0.0


# ---- Between the parent process and the engine process (one msgpack frame each) ----------------


class StartEngine(msgspec.Struct, frozen=True, tag="start"):
    """First frame from the parent: the whole EngineConfig, as builtins."""

    config: dict[str, object]


class AddRequest(msgspec.Struct, frozen=True, tag="add"):
    """A new request."""

    request: EngineRequest


class AbortRequest(msgspec.Struct, frozen=True, tag="abort"):
    """End a request; its blocks are free before the next step. index None: all its sequences."""

    request_id: str
    index: int | None = None


class ResetPrefixCache(msgspec.Struct, frozen=True, tag="reset_prefix_cache"):
    """Forget all cached prefixes; answered by PrefixCacheReset of the same number."""

    number: int


class EngineProgress(msgspec.Struct, frozen=True, tag="progress"):
    """Loading goes on."""

    phase: str
    fraction: float


class EngineReady(msgspec.Struct, frozen=True, tag="ready"):
    """The model has decoded a token; requests are welcome."""

    capacity: Capacity


class EngineFailed(msgspec.Struct, frozen=True, tag="failed"):
    """Loading failed or a step broke the engine; the process ends after this frame."""

    message: str


class EngineUpdates(msgspec.Struct, frozen=True, tag="updates"):
    """What one step brought."""

    updates: list[TokenUpdate]
    stats: EngineStats


class RequestRejected(msgspec.Struct, frozen=True, tag="rejected"):
    """The engine refused a request; fields as in errors.RequestError."""

    request_id: str
    error: str
    """Class name in errors.py: InvalidRequestError, ContextLengthError or OverloadedError."""
    message: str
    param: str | None = None
    code: str | None = None
    retry_after_s: float = 1.0


class PrefixCacheReset(msgspec.Struct, frozen=True, tag="prefix_cache_reset"):
    """The prefix cache is empty; it had so many blocks."""

    number: int
    num_blocks: int


ToEngine = StartEngine | AddRequest | AbortRequest | ResetPrefixCache
FromEngine = (
    EngineProgress | EngineReady | EngineFailed | EngineUpdates | RequestRejected | PrefixCacheReset
)


# ---- Between the engine's client side and the server or the user --------------------------------


class PromptUsage(msgspec.Struct, frozen=True, kw_only=True):
    """The length of a prompt, and how many of its tokens the prefix cache served."""

    num_prompt_tokens: int = 0
    num_cached_tokens: int = 0


class OutputDelta(msgspec.Struct, frozen=True, kw_only=True):
    """What is new of one sequence, as text and ids.

    Concatenated `text` over all deltas of an index is the whole answer; exactly one delta of an
    index has a finish_reason, and it is the last.
    """

    request_id: str
    index: int
    text: str = ""
    token_ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish_reason: FinishReason | None = None
    stop_reason: str | int | None = None
    """The stop string or stop token id that ended it; None for end-of-text and other reasons."""
    usage: PromptUsage = PromptUsage()


class CompletionOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One finished sequence of a request."""

    index: int
    text: str
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] | None
    finish_reason: FinishReason
    stop_reason: str | int | None = None


class RequestOutput(msgspec.Struct, frozen=True, kw_only=True):
    """A finished request, as `LLM.generate` returns it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    num_cached_tokens: int = 0


class Span(msgspec.Struct, frozen=True, array_like=True):
    """A stretch of a rendered prompt: special tokens are recognised only if `is_template`."""

    text: str
    is_template: bool


# ---- Between the scheduler and the executor (plain data, so they could cross a process) ----------


class NewSequence(msgspec.Struct, frozen=True, kw_only=True):
    """All of a sequence that the runner does not know yet, or no longer (after preemption).

    `row` is a small integer that names the sequence until it is in `SchedulerOutput.finished_rows`.
    """

    row: int
    index: int
    token_ids: list[int]
    """Prompt and output so far."""
    num_prompt_tokens: int
    params: SamplingParams


class PrefixReport(msgspec.Struct, frozen=True, kw_only=True):
    """What the prefix cache could do for a sequence that was admitted, for the debug log."""

    request_id: str
    index: int
    num_tokens: int
    num_cached_tokens: int
    block_size: int
    miss: MissReason | None
    """Why the first block after the cached tokens was missing; None: no more could be served."""


class Fork(msgspec.Struct, frozen=True, array_like=True):
    """A row goes on from another one, or from itself, with another token than was sampled for it.

    Attributes:
        row: gets the tokens, the block table and the parameters of `parent_row` as they were before
            any fork of this step.
        parent_row: where it comes from.
        position: where `token_id` stands: after the tokens that the parent has computed.
    """

    row: int
    parent_row: int
    position: int
    token_id: int


class BlockCopy(msgspec.Struct, frozen=True, array_like=True):
    """A row writes into a block that others hold too: it gets a copy first.

    Attributes:
        row: as in NewSequence.
        index: place in its block table that `destination` takes.
        source, destination: block ids; the copy is done before the step, in the order of the plan.
    """

    row: int
    index: int
    source: int
    destination: int


class ScheduledSequence(msgspec.Struct, frozen=True, array_like=True):
    """One row's part of a step.

    Attributes:
        row: as in NewSequence.
        num_computed_tokens: tokens whose K and V lie in the cache already.
        num_new_tokens: tokens to compute now, following those; 0: sample once more from the logits
            of the row before this one in the plan, which has the same tokens.
        new_block_ids: appended to the row's block table before this step.
        is_sampling: the last of the new tokens is the last known one: sample its successor.
    """

    row: int
    num_computed_tokens: int
    num_new_tokens: int
    new_block_ids: tuple[int, ...]
    is_sampling: bool


BlockMove = tuple[bytes, int]
"""The hash of a prefix, and the id of the block that holds K and V of its last tokens."""


class SchedulerOutput(msgspec.Struct, frozen=True, kw_only=True):
    """One step for the executor, applied in the order of its fields."""

    finished_rows: tuple[int, ...] = ()
    """Rows that ended or were preempted, maybe before any step of theirs: forget them."""
    forks: tuple[Fork, ...] = ()
    new_sequences: tuple[NewSequence, ...] = ()
    stores: tuple[BlockMove, ...] = ()
    """Blocks to keep in the tier below the pool before anything overwrites them."""
    copies: tuple[BlockCopy, ...] = ()
    loads: tuple[BlockMove, ...] = ()
    """Blocks to fill with what that tier has fetched."""
    scheduled: tuple[ScheduledSequence, ...] = ()

    @property
    def num_tokens(self) -> int:
        """How many tokens the step computes."""
        return sum(s.num_new_tokens for s in self.scheduled)


class SampledTokens(msgspec.Struct, frozen=True, array_like=True):
    """What a step sampled for one row: one id, or more with drafts; -1: logits not finite."""

    row: int
    token_ids: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...] = ()


class ModelOutput(msgspec.Struct, frozen=True, kw_only=True):
    """The executor's answer to one SchedulerOutput: one entry for each row with is_sampling."""

    sampled: tuple[SampledTokens, ...] = ()
