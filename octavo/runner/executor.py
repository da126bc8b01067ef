"""InProcessExecutor: the model in this very process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from octavo.config import EngineConfig
from octavo.runner.block_store import DiskBlockStore
from octavo.runner.disk_tier import DiskTier
from octavo.runner.loading import PhaseProgress, load
from octavo.runner.runner import PendingStep, Runner
from octavo.types import Capacity, KVPool, SchedulerOutput


class InProcessExecutor:
    """Loads a model at `start` and computes steps in the caller's thread.

    Attributes:
        depth: as of the Program, once started.
        tier: where KV blocks go that leave the pool, once started; None drops them.
    """

    def __init__(
        self,
        config: EngineConfig,
        eos_token_ids: Callable[[], Iterable[int]],
        progress: PhaseProgress,
    ) -> None:
        """Keep what `start` needs; nothing is read yet.

        Args:
            config: which model, and how much of everything.
            eos_token_ids: asked once the model is loaded, so that a file which is no model at all
                is reported as such and not for its lack of a tokenizer.
            progress: called while loading.
        """
        self._config = config
        self._eos_token_ids = eos_token_ids
        self._progress = progress
        self._runner: Runner | None = None
        self.depth = 1
        self.tier: DiskTier | None = None
        self._close = _nothing

    def start(self) -> Capacity:
        """Load the model, allocate the KV pool and tell what fits.

        Raises:
            ConfigError: the model cannot be loaded as asked (ModelFileError: its files are at
                fault).
        """
        config = self._config
        loaded = load(config, self._progress)
        program = loaded.program
        self._close = program.close
        self.depth = program.depth
        if config.kv_disk is not None:
            store = DiskBlockStore(
                Path(config.kv_disk), loaded.cache_identity.encode(), program.block_bytes(),
                config.kv_disk_bytes,
            )  # fmt: skip
            self.tier = DiskTier(program, store, config.block_size, config.max_num_batched_tokens)
        self._runner = Runner(
            program,
            num_rows=config.max_num_seqs,
            max_model_len=loaded.max_model_len,
            block_size=config.block_size,
            eos_token_ids=self._eos_token_ids(),
            tier=self.tier,
        )
        return Capacity(
            model=config.served_name,
            architecture=loaded.architecture,
            num_parameters=loaded.num_parameters,
            max_model_len=loaded.max_model_len,
            kv_pool=KVPool(
                num_blocks=loaded.num_blocks,
                block_size=config.block_size,
                num_bytes=loaded.num_blocks * program.block_bytes(),
                identity=loaded.cache_identity,
            ),
            weights_bytes=program.weights_bytes,
            vocab_size=loaded.vocab_size,
            backend=program.description,
        )

    def submit(self, plan: SchedulerOutput) -> PendingStep:
        """Begin a step; raises what fails of it, or its result does."""
        assert self._runner is not None, "start() comes first"
        return self._runner.start(plan)

    def close(self) -> None:
        """Free the model; idempotent."""
        self._runner = None
        tier, self.tier = self.tier, None
        if tier is not None:
            tier.close()
        close, self._close = self._close, _nothing
        close()


def _nothing() -> None:
    """What is left to close when nothing is open."""
