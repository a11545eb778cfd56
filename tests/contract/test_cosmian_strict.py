"""JOSE answers of a Cosmian KMS server that are well formed and wrong in one thing."""

import json
from base64 import urlsafe_b64encode
from collections.abc import Callable
from string import ascii_lowercase, ascii_uppercase, digits
from typing import Final

import pytest

from kms_protocol.errors import BackendUnavailable
from support.contract.cosmian_ciphers import AAD, SECRET, cipher_of, made
from support.contract.cosmian_double import CosmianDouble, Handler

ALPHABET: Final = ascii_uppercase + ascii_lowercase + digits + "-_"
OTHER_HEADER: Final = urlsafe_b64encode(b'{"alg":"dir","enc":"A256GCM","kid":"other"}').rstrip(b"=").decode()


def changed(name: str, change: Callable[[str], str]) -> Callable[[Handler], bool]:
    """A fault: the right answer, with one member changed."""

    def answer(handler: Handler) -> bool:
        body = handler.answer(handler.double.requests[-1][1])
        handler.reply(200, "application/json", json.dumps(body | {name: change(body[name])}).encode())
        return True

    return answer


def test_what_another_key_sealed_is_refused(double: CosmianDouble) -> None:
    """The protected header names the key: one that is not ours would be found out when a file is opened."""
    cipher = made(cipher_of(double, "jose"))
    cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(changed("protected", lambda _: OTHER_HEADER))

    with pytest.raises(BackendUnavailable):
        cipher.encrypt(SECRET, "1", AAD)
    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET


LAX: Final[dict[str, Callable[[str], str]]] = {
    "padded": lambda text: text + "=" * (-len(text) % 4),
    "with a line end": lambda text: f"{text}\n",
    "with another character": lambda text: f"{text[:4]}!{text[4:]}",
    "with bits that no octet holds": lambda text: text[:-1] + ALPHABET[ALPHABET.index(text[-1]) + 1],
}


@pytest.mark.parametrize("change", LAX.values(), ids=LAX)
def test_base64_has_one_form(double: CosmianDouble, change: Callable[[str], str]) -> None:
    """RFC 7515 §2: a lax decoder would read the right plaintext from each of them."""
    cipher = made(cipher_of(double, "jose"))
    wrapped = cipher.encrypt(SECRET, "1", AAD)
    double.faults.append(changed("data", change))

    with pytest.raises(BackendUnavailable):
        cipher.decrypt(wrapped, "1", AAD)
    double.faults.append(changed("data", str))
    assert cipher.decrypt(wrapped, "1", AAD) == SECRET
