"""API keys: every path needs one, except the few that say whether the server lives."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Iterable, Mapping

from octavo.server.http import HttpError

OPEN_PATHS = frozenset({"/live", "/ready", "/health"})
"""Compared with the whole decoded path, so a path that only resembles one of these needs a key."""


class KeyRing:
    """The keys that a server takes, kept as digests."""

    def __init__(self, keys: Iterable[str]) -> None:
        """No keys: everyone is welcome."""
        self._digests = [hashlib.sha256(key.encode()).digest() for key in keys]

    def check(self, path: str, headers: Mapping[bytes, bytes]) -> str:
        """Raise a 401 unless the path is open or the request carries a key.

        All digests are compared, each in constant time, so the time taken tells nothing about a
        key.

        Returns:
            A name for the key, the same after every start and no help in finding the key; empty
            where none is needed.
        """
        if not self._digests or path in OPEN_PATHS:
            return ""
        digest = hashlib.sha256(_given_key(headers)).digest()
        if not sum(hmac.compare_digest(digest, known) for known in self._digests):
            raise HttpError(
                401,
                "An API key is needed: send it as 'Authorization: Bearer KEY' or 'x-api-key: KEY'.",
                code="invalid_api_key",
                headers=[(b"www-authenticate", b"Bearer")],
            )
        return hashlib.sha256(b"octavo key name" + digest).hexdigest()


def _given_key(headers: Mapping[bytes, bytes]) -> bytes:
    scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
    if scheme.lower() == b"bearer" and key:
        return key.strip()
    return headers.get(b"x-api-key", b"")
