"""Bodies, paths and ciphertexts of the Vault façade: one of its shapes, or refused without a value."""

from collections.abc import Iterable
from typing import Final

import msgspec
from fastapi import FastAPI

from kms_api import json_body
from kms_api.app import VAULT
from kms_api.routing import Dispatcher
from kms_api.vault_api import models
from kms_api.vault_api.bound import Extra
from kms_protocol import wire
from kms_protocol.context import Context
from kms_protocol.errors import InvalidContext, InvalidRequest

MOST_BYTES: Final = 2 * 1024
CANARY: Final = b"cAnArY"
ROUTES: Final = Dispatcher(FastAPI(), {"": VAULT})
SHAPES: Final = (models.TransitIn, models.DataKeyIn, models.KeyIn, models.PathsIn, models.EmptyIn)
WORDS: Final = (
    *(f'"{field}":'.encode() for shape in SHAPES for field in shape.__struct_encode_fields__),
    b"vault:v1:",
    b'"batch_input":[{',
    b"/v1/transit/",
    b"/keys/",
    b"/datakey/plaintext/",
    b"/encrypt/",
    b"null",
    b'"true"',
    b'"1e999"',
    CANARY,
)


def seeds() -> Iterable[bytes]:
    yield b""
    yield b'{"plaintext":"c2FsYXJ5","context":"cm93","associated_data":"cAnA"}'
    yield b'{"ciphertext":"vault:v1:c2FsYXJ5"}'
    yield b'{"batch_input":[{"plaintext":"AAAA","reference":"cAnArY"},{"ciphertext":"vault:v2:AA=="},null]}'
    yield b'{"key_version":"3","convergent_encryption":"true","partial_failure_response_code":207}'
    yield b'{"bits":256}'
    yield b'{"type":"aes256-gcm96","derived":false,"auto_rotate_period":"24h"}'
    yield b'{"paths":["sys/mounts/cAnArY"],"token":"cAnArY"}'
    yield b'{"increment":9e99}'
    yield b'{"batch_input":[' + b"[" * 3000
    yield b"vault:v999999999:" + b"A" * 20
    yield b"/v1/transit/keys/payroll/rotate"
    yield b"/v1/deep/er/transit/encrypt/payroll"


def check(data: bytes) -> None:
    _body(data)
    text = data.decode("utf-8", "surrogateescape")
    _path(text)
    _ciphertext(text)


def _body(data: bytes) -> None:
    for shape in SHAPES:
        try:
            body = json_body.decode(data, shape, is_lenient=True)
        except InvalidRequest as exc:
            assert CANARY.decode() not in exc.detail, "a refusal repeats what was sent"
            continue
        assert "(…)" in repr(body)
        if isinstance(body, models.TransitIn):
            for item in body.batch_input or ():
                _item(item)
            _bound(body)
        else:
            assert json_body.decode(wire.encode(body), shape, is_lenient=True) == body


def _item(raw: msgspec.Raw) -> None:
    try:
        _bound(json_body.decode(raw, models.TransitIn, is_lenient=True))
    except InvalidRequest as exc:
        assert CANARY.decode() not in exc.detail, "a refusal repeats what was sent"


def _bound(body: models.BoundFields) -> None:
    """What binds a call: each of the two, and which of them it is, tells another context."""
    try:
        one, other = models.octets(body.context, "context"), models.octets(body.associated_data, "data")
        context = Extra(one, other, 0).bound(1)
        turned = Extra(other, one, 0).bound(1)
    except (InvalidContext, InvalidRequest):
        return
    assert isinstance(context, Context)
    assert (context.canonical() == turned.canonical()) == (one == other)
    assert context.canonical() != Extra(one, other, 0).bound(2).canonical()


def _path(text: str) -> None:
    methods, names = ROUTES.find("GET", text)
    assert all(value and value in text for value in names.values())
    assert methods or not names


def _ciphertext(text: str) -> None:
    try:
        number, file = models.parse(text)
    except InvalidRequest:
        return
    assert 1 <= number <= 10**9
    assert models.parse(models.render(number, file)) == (number, file)
