"""What every table of ``kms.toml`` is made of: the base of their shapes, and the types that several use."""

from typing import Annotated, Final, Literal

from msgspec import Meta, Struct

KiB: Final = 1024
MiB: Final = 1024 * KiB
GiB: Final = 1024 * MiB

KeyId = Annotated[str, Meta(pattern="^[A-Za-z0-9_.-]{1,80}(?!\\s)$")]
BackendName = Literal["age", "cosmian", "transit", "vault-kv", "awskms"]
Positive = Annotated[int, Meta(ge=1)]
Seconds = Annotated[float, Meta(gt=0, le=3600)]
Timeout = Annotated[float, Meta(gt=0, le=120)]


class Section(Struct, frozen=True, kw_only=True):
    """A table of the file: immutable, and silent in ``repr``, since URLs and API keys are secrets."""

    def __repr__(self) -> str:
        return f"{type(self).__name__}(…)"

    def __rich_repr__(self) -> list[tuple[str, object]]:  # msgspec would otherwise list every field to rich
        return []
