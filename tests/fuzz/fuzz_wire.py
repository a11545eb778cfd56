"""Bodies of requests: each is one of our shapes, written again as the same, or refused without its values."""

from collections.abc import Iterable
from typing import Final

import msgspec

from kms_api.json_body import decode
from kms_protocol import wire
from kms_protocol.errors import InvalidRequest

MOST_BYTES: Final = 2 * 1024
CANARY: Final = b"cAnArY"
SHAPES: Final = tuple(
    sorted(
        {shape for shape in vars(wire).values() if isinstance(shape, type) and issubclass(shape, wire.Body)},
        key=lambda shape: shape.__name__,
    )
)
WORDS: Final = (
    *(f'"{field}":'.encode() for shape in SHAPES for field in shape.__struct_encode_fields__),
    b'"encrypt"',
    b'"items":[{',
    b"null",
    b"1e999",
    b"-0",
    b"99999999999999999999",
    b'"\\ud800"',
    CANARY,
)


def seeds() -> Iterable[bytes]:
    yield b""
    yield b"{}"
    yield b'{"plaintext":"c2FsYXJ5","context":"env=cAnArY","key_id":"default"}'
    yield b'{"ciphertext":"c2FsYXJ5","context":{"env":"cAnArY"},"new_context":null}'
    yield b'{"operation":"encrypt","items":[{"plaintext":"cAnArY==","reference":"cAnArY"}]}'
    yield b'{"key_spec":"AES_256","number_of_bytes":32,"without_plaintext":true}'
    yield b'{"kind":"rewrap","source":"file:///cAnArY/*","overwrite":true,"ttl_s":60}'
    yield b'{"kind":"encrypt","items":[{"plaintext":""}],"priority":"high","callback":"x"}'
    yield (
        b'{"version":1,"token":"cAnArY","job_id":"0b3d5f6a-8f3f-4f7e-9d6b-1f2e3d4c5b6a",'
        b'"expires_at":"2027-01-31T12:00:00Z","job":{"kind":"encrypt"}}'
    )
    yield b'{"cAnArY":1}'
    yield b'{"context":{"a":"' + b"[" * 100 + b'"}}'
    yield b'{"plaintext":' + b"[" * 3000
    yield b'{"number_of_bytes":' + b"9" * 5000 + b"}"


def check(data: bytes) -> None:
    for shape in SHAPES:
        try:
            body = decode(data, shape)
        except InvalidRequest as exc:
            assert CANARY.decode() not in exc.detail, "a refusal repeats what was sent"
            assert exc.__cause__ is None
            continue
        again = wire.encode(body)
        assert decode(again, shape) == body
        assert wire.encode(decode(again, shape)) == again
        assert repr(body) == f"{shape.__name__}(…)"
        assert isinstance(msgspec.json.decode(again), dict)
