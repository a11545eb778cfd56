"""JOSE answers of a Cosmian KMS server that are well formed and wrong in one thing."""

import json
from base64 import urlsafe_b64encode
from collections.abc import Callable
from typing import Final

import pytest

from contract.cosmian_ciphers import AAD, SECRET, cipher_of, made
from contract.cosmian_double import CosmianDouble, Handler
from kms_core.errors import BackendUnavailable

TEXT: Final = urlsafe_b64encode(SECRET).rstrip(b"=").decode()
OTHER_HEADER: Final = urlsafe_b64encode(b'{"alg":"dir","enc":"A256GCM","kid":"other"}').rstrip(b"=").decode()


def changed(name: str, value: str) -> Callable[[Handler], bool]:
    """A fault: the right answer but for one member."""

    def answer(handler: Handler) -> bool:
        body = handler.answer(handler.double.requests[-1][1]) | {name: value}
        handler.reply(200, "application/json", json.dumps(body).encode())
        return True

    return answer


def test_what_another_key_sealed_is_refused(double: CosmianDouble) -> None:
    """The protected header names the key: one that is not ours would be found out when a file is opened."""
    cipher = made(cipher_of(double, "jose"))
    cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(changed("protected", OTHER_HEADER))

    with pytest.raises(BackendUnavailable):
        cipher.encrypt(SECRET, "1", AAD)
    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


@pytest.mark.parametrize(
    "text", [f"{TEXT}==", f"{TEXT}\n", f"{TEXT[:4]}!{TEXT[4:]}", f"{TEXT[:-1]}x"], ids=ascii
)
def test_base64_has_one_form(double: CosmianDouble, text: str) -> None:
    """RFC 7515 §2: no padding, no other characters. The last of these has bits that no octet holds."""
    cipher = made(cipher_of(double, "jose"))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(changed("data", text))

    with pytest.raises(BackendUnavailable):
        cipher.decrypt(wrapped, "1", AAD)
