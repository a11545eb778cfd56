"""Which calls into the core the event loop runs itself."""

import threading
from types import SimpleNamespace
from typing import cast

import pytest

from kms_api import deps
from kms_api.deps import LOCAL_CALLER, Service
from kms_api.routing import Call
from kms_core.age.header import Stanza, bundle, render_stanza

pytestmark = pytest.mark.anyio
ONE = Stanza(("X25519", "a"), bytes(32))


@pytest.mark.parametrize(
    ("data", "apart"),
    [
        (b"salary", False),
        (render_stanza(ONE) * 2, False),
        (render_stanza(ONE) * (deps.INLINE_STANZAS + 2), True),
        (render_stanza(bundle([ONE] * 2)), True),
        (bytes(deps.INLINE_BYTES + 1), True),
    ],
    ids=["small", "few stanzas", "many stanzas", "a bundle", "large"],
)
async def test_what_may_take_long_does_not_hold_up_the_loop(data: bytes, apart: bool) -> None:
    keyring = SimpleNamespace(waits_on=lambda *_: None, blocks=False)
    settings = SimpleNamespace(kms=SimpleNamespace(audit=SimpleNamespace(durability="write")))
    kms = SimpleNamespace(keyring=keyring)
    local = cast("Service", SimpleNamespace(settings=settings, kms=kms, limiters={}))

    call = cast("Call[None]", SimpleNamespace(service=local, caller=LOCAL_CALLER))

    pool = Call.key_pool(call, None, file=data)
    thread = await Service.run(local, pool, threading.get_ident)

    assert (thread != threading.get_ident()) is apart
