"""The debug log is written if the environment asks for it, and is nobody's business otherwise."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from octavo.engine.debug_log import DEBUG_VARIABLE

CODE = """
import logging
from octavo.engine.debug_log import write_debug_log
write_debug_log()
logging.getLogger("octavo.engine").debug("a line")
logging.getLogger("another").info("of others")
"""


@pytest.mark.parametrize(("value", "is_written"), [("1", True), ("", False), (None, False)])
def test_it_is_written_on_request(value: str | None, is_written: bool) -> None:
    environment = {k: v for k, v in os.environ.items() if k != DEBUG_VARIABLE}
    environment |= {DEBUG_VARIABLE: value} if value is not None else {}
    environment["PYTHONPATH"] = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-c", CODE], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stderr.endswith(" octavo.engine DEBUG a line\n") == is_written
    assert is_written or done.stderr == ""
    assert done.stdout == ""
