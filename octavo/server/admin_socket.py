"""The socket file of the admin routes: made for its owner alone, and removed at the end.

Imports nothing heavy: it is bound before the engine process is started, so that a fault is told at
once.
"""

from __future__ import annotations

import contextlib
import os
import socket
import stat
from collections.abc import Iterator

from octavo.errors import ConfigError

_BACKLOG = 16


@contextlib.contextmanager
def listen_at(path: str | None) -> Iterator[socket.socket | None]:
    """A listening Unix socket at `path` that only its owner can open; None: no socket.

    A socket file that nobody listens at any more, left by a server that was killed, is replaced.

    Raises:
        ConfigError: the path is taken, too long, or not to be written.
    """
    if path is None:
        yield None
        return
    _remove_stale(path)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as listener:
        before = os.umask(0o177)  # the file is never open to others, not even for a moment
        try:
            listener.bind(path)
            listener.listen(_BACKLOG)
            made = os.stat(path)
        except OSError as error:
            raise ConfigError(
                f"--admin-socket {path} can't be made: {error.strerror or error}; choose another "
                "path, of at most 100 bytes, in a folder that can be written"
            ) from None
        finally:
            os.umask(before)
        try:
            yield listener
        finally:
            with contextlib.suppress(OSError):  # the event loop may have removed it
                if os.path.samestat(os.stat(path), made):
                    os.unlink(path)


def _remove_stale(path: str) -> None:
    try:
        is_socket = stat.S_ISSOCK(os.lstat(path).st_mode)
    except OSError:  # nothing is there, or `bind` will say what is wrong
        return
    if not is_socket:
        raise ConfigError(f"--admin-socket {path} exists and is no socket; choose another path")
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            os.unlink(path)
            return
        except OSError as error:
            raise ConfigError(
                f"--admin-socket {path} can't be used: {error.strerror}; choose another path"
            ) from None
    raise ConfigError(
        f"--admin-socket {path} is another server's; stop that one or choose another path"
    )
