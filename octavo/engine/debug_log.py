"""The debug log: on standard error, if OCTAVO_DEBUG is set; whoever embeds Octavo configures it."""

from __future__ import annotations

import logging
import os

DEBUG_VARIABLE = "OCTAVO_DEBUG"


def write_debug_log() -> None:
    """Write what Octavo's modules log, from level DEBUG on, if the environment asks for it."""
    if not os.environ.get(DEBUG_VARIABLE):
        return
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(name)s %(levelname)s %(message)s"))
    log = logging.getLogger("octavo")
    log.addHandler(handler)
    log.setLevel(logging.DEBUG)
    log.propagate = False
