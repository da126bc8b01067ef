"""Every exception that Octavo raises on purpose, with what a user can do about it.

    OctavoError
    ├── ConfigError               start-up: an option, a file, a model; lists every fault found
    │   └── ModelFileError        a weight or tokenizer file is missing, cut, corrupt or unsupported
    ├── RequestError              one request failed; `status`, `code` and `param` reach the client
    │   ├── InvalidRequestError   400: the request is at fault
    │   │   └── ContextLengthError   400: more tokens than can ever fit
    │   ├── ModelNotFoundError    404
    │   ├── OverloadedError       503: the queue, or the room for pins, is full; carries Retry-After
    │   └── EngineDeadError       503: the engine process ended
    └── KernelError               ours, never the client's

This module imports nothing of Octavo.
"""

from __future__ import annotations


class OctavoError(Exception):
    """The root: catch this to catch everything that Octavo raises on purpose."""


class ConfigError(OctavoError):
    """Start-up is impossible as asked; the message says the cause and the remedy."""


class ModelFileError(ConfigError):
    """A model's file is missing, cut, corrupt or of an unsupported kind."""


class RequestError(OctavoError):
    """A request failed. `status` is HTTP's; `code` and `param` follow OpenAI's error body."""

    status = 500
    kind = "server_error"

    def __init__(self, message: str, *, param: str | None = None, code: str | None = None) -> None:
        """Keep the message and the two fields that help a client to find its fault."""
        super().__init__(message)
        self.message = message
        self.param = param
        self.code = code


class InvalidRequestError(RequestError):
    """The request itself is at fault; `param` names the field."""

    status = 400
    kind = "invalid_request_error"


class ContextLengthError(InvalidRequestError):
    """Prompt and answer need more tokens than the model or the KV cache can ever hold."""

    def __init__(self, message: str, *, param: str | None = None) -> None:
        """Use OpenAI's code for this fault."""
        super().__init__(message, param=param, code="context_length_exceeded")


class ModelNotFoundError(RequestError):
    """The named model is not served here."""

    status = 404
    kind = "invalid_request_error"

    def __init__(self, message: str) -> None:
        """Use OpenAI's code for this fault."""
        super().__init__(message, param="model", code="model_not_found")


class OverloadedError(RequestError):
    """The waiting queue, or what may be pinned, is full; try again after `retry_after_s`."""

    status = 503
    kind = "overloaded"

    def __init__(
        self, message: str, *, retry_after_s: float = 1.0, code: str | None = "queue_full"
    ) -> None:
        """Keep how long a client should wait."""
        super().__init__(message, code=code)
        self.retry_after_s = retry_after_s


class EngineDeadError(RequestError):
    """The engine process ended; nothing can be computed any more."""

    status = 503
    kind = "server_error"

    def __init__(self, message: str) -> None:
        """Use one code for every way in which the engine can end."""
        super().__init__(message, code="engine_unavailable")


class KernelError(OctavoError):
    """A backend was called outside its contract: a bug of ours."""
