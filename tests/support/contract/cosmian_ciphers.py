"""Ciphers of a double of a Cosmian KMS server for tests, what it was asked, and how it fails."""

import json
import threading
from collections.abc import Callable
from typing import Any, Final

from kms_core.backends.cosmian import backend
from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from kms_core.backends.cosmian.server import Protocol
from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.settings.load import load
from kms_core.settings.model import Settings
from support.contract.cosmian_double import CosmianDouble, Handler
from support.contract.rig_cosmian import cosmian
from support.waiting import WAIT_S

SECRET: Final = bytes(range(16))
AAD: Final = b"names and a context"
ALICE: Final = "YWxpY2U"
MALLORY: Final = "bWFsbG9yeQ"
"""API tokens of the users of ``shared``."""


def cipher_of(double: CosmianDouble, protocol: Protocol = "auto", name: str = "payroll") -> CosmianCipher:
    return CosmianCipher(CosmianKey(cosmian(double.url, protocol), name))


def with_first_version(cipher: CosmianCipher) -> CosmianCipher:
    """With its first version."""
    with cipher.key.call():
        cipher.key.init()
    return cipher


def key_of(double: CosmianDouble, token: str, name: str = "payroll") -> CosmianKey:
    return CosmianKey(cosmian(double.url, token=token), name)


def versions(cipher: CosmianCipher) -> list[str]:
    return [version.version for version in cipher.versions()]


def settings_of(double: CosmianDouble, keys: dict[str, str], **section: object) -> Settings:
    """Settings with this server, and a state directory that nobody makes."""
    overrides: dict[str, object] = {"state_dir": "/nowhere", "keys": keys}
    overrides |= {f"cosmian.{name}": value for name, value in section.items()}
    return load(None, {"COSMIAN_KMS_URL": double.url}, overrides=overrides)


def configured_key(name: str, settings: Settings) -> CosmianKey:
    return backend.key_of(name, settings.backend(CosmianSection), strict=settings.is_prod)


def operations(double: CosmianDouble) -> list[dict[str, Any]]:
    """Every operation that came, in whichever way."""
    found = []
    for _, body in double.requests:
        if isinstance(body, dict) and body.get("tag") == "RequestMessage":
            items = [each["value"] for each in body["value"] if each["tag"] == "BatchItem"]
            found += [{"tag": item[0]["value"], "value": item[-1]["value"]} for item in items]
        elif isinstance(body, dict) and "tag" in body and "value" in body:
            found.append(body)
    return found


def answering(status: int, body: bytes, kind: str = "text/html; charset=utf-8") -> Callable[[Handler], bool]:
    """A fault: this answer, whatever was asked."""

    def answer(handler: Handler) -> bool:
        handler.reply(status, kind, body)
        return True

    return answer


def held_back(double: CosmianDouble, operation: str = "") -> tuple[threading.Event, threading.Event]:
    """The next request waits (or the next of this operation): events for its arrival, and to let it go."""
    came, go_on = threading.Event(), threading.Event()

    def hold(handler: Handler) -> bool:
        if f'"{operation}"' not in json.dumps(handler.double.requests[-1][1]) and operation:
            double.faults.append(hold)
            return False
        came.set()
        assert go_on.wait(WAIT_S)
        return False

    double.faults.append(hold)
    return came, go_on
