"""Starting an engine process: as early as possible, so it imports next to nothing.

The process inherits one end of a socketpair, the import path, and nothing else.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys

import msgspec

from octavo.config import EngineConfig
from octavo.engine.transport import encode
from octavo.types import StartEngine


class EngineProcess:
    """A process that runs an engine, and the socket to it.

    Attributes:
        socket: our end; the engine ends when it is closed, by us or by our own end.
    """

    def __init__(self, process: subprocess.Popen[bytes], sock: socket.socket) -> None:
        """Use `start` instead."""
        self._process = process
        self.socket = sock

    @classmethod
    def start(cls, config: EngineConfig) -> EngineProcess:
        """Start an engine; waits for nothing.

        Raises:
            ConfigError: the configuration is at fault.
        """
        start = encode(StartEngine(config=msgspec.to_builtins(config.validate())))
        ours, theirs = socket.socketpair()
        with theirs:
            process = subprocess.Popen(
                # -P: what is imported must not depend on the current folder, unless ours does.
                [sys.executable, "-P", "-m", "octavo.engine.process", str(theirs.fileno())],
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path))},
                stdin=subprocess.DEVNULL,
                start_new_session=True,  # Ctrl-C in a terminal reaches the parent alone
            )
        ours.sendall(start)
        return cls(process, ours)

    @property
    def pid(self) -> int:
        """The process id."""
        return self._process.pid

    @property
    def exit_code(self) -> int | None:
        """The exit code, negative for a signal; None while the process runs."""
        return self._process.poll()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal; one to a process that has ended is no fault."""
        self._process.send_signal(number)
