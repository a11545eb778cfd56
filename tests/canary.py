"""Forms in which a secret may rest where it should not."""

from base64 import b64encode, urlsafe_b64encode
from collections.abc import Iterator


def forms(word: str) -> Iterator[bytes]:
    """A word as it may rest: plain, in hex, and in base64 at each of the three alignments."""
    raw = word.encode()
    yield from (raw, raw.hex().encode(), raw.hex().upper().encode(), raw.decode().encode("utf-16-le"))
    for shift in range(3):
        for encode in (b64encode, urlsafe_b64encode):
            text = encode(b"\0" * shift + raw).rstrip(b"=")
            yield text[4:-2] if shift else text[:-2]
