"""InProcessExecutor: the model in this very process."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path

from octavo.config import EngineConfig, available_memory
from octavo.errors import ConfigError
from octavo.runner.block_store import DiskBlockStore
from octavo.runner.loading import LoadedModel, PhaseProgress, load
from octavo.runner.memory_store import MemoryBlockStore
from octavo.runner.runner import PendingStep, Runner
from octavo.runner.store_tier import StoreTier
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
        self.tier: StoreTier | None = None
        self._disk: DiskBlockStore | None = None
        self._close = _nothing

    def start(self) -> Capacity:
        """Load the model, allocate the KV pool and tell what fits.

        Raises:
            ConfigError: the model cannot be loaded as asked (ModelFileError: its files are at
                fault).
        """
        config = self._config
        if config.kv_host_bytes > (free_bytes := available_memory()):
            raise ConfigError(
                f"--kv-host of {config.kv_host_bytes:,} bytes is more than the {free_bytes:,} that "
                "are free in the host's memory: lower it"
            )
        loaded = load(config, self._progress)
        program = loaded.program
        self._close = program.close
        self.depth = program.depth
        self.tier = self._open_tier(loaded)
        self._runner = Runner(
            program,
            num_rows=config.max_num_seqs,
            max_model_len=loaded.max_model_len,
            block_size=config.block_size,
            eos_token_ids=[one for one in self._eos_token_ids() if one < loaded.vocab_size],
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

    def _open_tier(self, loaded: LoadedModel) -> StoreTier | None:
        """What lies below the pool, if anything shall."""
        config, program = self._config, loaded.program
        block_bytes = program.block_bytes()
        if config.kv_disk is not None:
            self._disk = DiskBlockStore(
                Path(config.kv_disk), loaded.cache_identity.encode(), block_bytes,
                config.kv_disk_bytes,
            )  # fmt: skip
        host = None
        if config.kv_host_bytes > 0:
            allocate = program.host_memory
            host = MemoryBlockStore(block_bytes, config.kv_host_bytes, allocate, self._disk)
        if host is None and self._disk is None:
            return None
        size, most = config.block_size, config.max_num_batched_tokens
        return StoreTier(program, host, self._disk, size, most)

    def submit(self, plan: SchedulerOutput) -> PendingStep:
        """Begin a step; raises what fails of it, or its result does."""
        assert self._runner is not None, "start() comes first"
        return self._runner.start(plan)

    def close(self) -> None:
        """Free the model; idempotent."""
        self._runner = None
        tier, self.tier = self.tier, None
        disk, self._disk = self._disk, None
        close, self._close = self._close, _nothing
        try:
            if tier is not None:
                tier.close()
        finally:
            if disk is not None:
                disk.close()
            close()


def _nothing() -> None:
    """What is left to close when nothing is open."""
