"""Makes an 8B model of dummy weights and computes one token; part E of run.py times it.

`python first_token.py DEVICE QUICK` prints the time of day, in seconds, after its imports, with the
weights on the device, with the cache allocated, and with the first token. What is slow writes where
it stands to standard error.
"""

from __future__ import annotations

import faulthandler
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parents[1]), str(HERE)]

# After the path, by which they are found.
import numpy as np  # noqa: E402
import torch  # noqa: E402
from parts import dummy  # noqa: E402
from parts.machine import Setup, synchronize  # noqa: E402
from parts.steps import sampling_rows, step_of  # noqa: E402

PROMPT = 64
SLOW_SECONDS = 25


def main() -> None:
    """Print the times."""
    faulthandler.dump_traceback_later(SLOW_SECONDS)
    setup = Setup(torch.device(sys.argv[1]), quick=sys.argv[2] == "1")
    times = [time.time()]
    model = dummy.make(setup, dummy.shape_of("Llama-3.1-8B", setup), max_num_tokens=2048)
    synchronize(setup.device)
    times.append(time.time())
    spare = model.program.spare_bytes()
    blocks = 64 if spare is None else int(0.9 * spare) // model.program.block_bytes()
    model.program.allocate_cache(blocks)
    synchronize(setup.device)
    times.append(time.time())
    counts = np.array([PROMPT], np.int32)
    tables = np.arange(PROMPT // dummy.BLOCK_SIZE, dtype=np.int32)[None]
    batch = step_of(tables, counts * 0, counts, np.ones(PROMPT, np.int32), dummy.BLOCK_SIZE)
    output = model.program.start(batch, sampling_rows(1)).result()
    times.append(time.time())
    if output.tokens.shape != (1,) or output.tokens[0] < 0:
        raise SystemExit(f"no token was sampled: {output.tokens}")
    print("\n".join(map(str, times)))


if __name__ == "__main__":
    main()
