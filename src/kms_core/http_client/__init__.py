"""HTTP clients with a deadline for a whole call: backends, identity providers, object stores."""

from kms_protocol.errors import BackendUnavailable


class Unreachable(BackendUnavailable):
    """No connection, a time out, or 502 to 504: the next call, or another backend, may do."""


class Busy(BackendUnavailable):
    """An answer that says not now (429, 412, other 5xx): worth another try, when the peer says if it does."""

    def __init__(self, detail: str = "", *, retry_after_s: float = 0.0) -> None:
        super().__init__(detail, retry_after_s=retry_after_s)
