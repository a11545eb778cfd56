"""What the gate, forms and the Vault API refuse, asked of their functions without a server."""

from types import SimpleNamespace
from typing import Any, Final, cast

import msgspec
import pytest
from fastapi import Request
from starlette.types import Receive, Scope, Send

from kms_api.deps import PRINCIPAL, Service
from kms_api.routing import Call
from kms_api.transport.authentication import AuthenticationLayer, RequestAuthenticator, token_of
from kms_api.transport.request_context import ClientAddress
from kms_api.ui.render import _holder
from kms_api.ui.sessions import COOKIE, Sessions
from kms_api.vault_api import sys
from kms_api.vault_api.models import PathsIn
from kms_api.vault_api.routing import check_headers
from kms_core.auth.policy import Principal
from kms_core.jobs.model import RecordKey
from kms_core.proxies import Proxies
from kms_core.settings.model import ServerSection
from kms_protocol.errors import Forbidden, InvalidRequest, Unauthenticated
from support.job_stores import connect

ADA: Final = Principal("ada", "acme", "token:1")
pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("is_worth", [True, False])
async def test_a_session_is_worth_what_its_credential_is(redis_url: str, *, is_worth: bool) -> None:
    sessions = Sessions(connect(redis_url), RecordKey((bytes(32),)))
    session = sessions.begin(ADA)
    entry = cast("RequestAuthenticator", SimpleNamespace(is_valid=lambda who: is_worth and who == ADA))
    service = SimpleNamespace(
        requests=None,
        settings=SimpleNamespace(kms=SimpleNamespace(server=ServerSection(docs=False))),
        authenticator=None,
        kms=SimpleNamespace(policy=None),
    )
    gate = AuthenticationLayer(cast("Any", None), entry, sessions, cast("Service", service), frozenset())
    scope = {"path": "/ui", "headers": [(b"cookie", f"{COOKIE}={session}".encode())]}

    found = await gate._of_session(scope, entry)  # noqa: SLF001 -- needs no server
    assert found == (ADA if is_worth else None)
    assert sessions.find(session) == (ADA if is_worth else None), "its record is gone as well"


@pytest.mark.parametrize(
    "other",
    [
        Principal("ada", "beta", "token:1"),
        Principal("ada", "acme", "token:2"),
        Principal("bob", "acme", "token:1"),
    ],
)
async def test_a_form_is_stamped_for_one_credential_of_one_tenant(other: Principal) -> None:
    def holder(who: Principal) -> str:
        return _holder(Request({"type": "http", "headers": [], PRINCIPAL: who}))

    assert holder(ADA) == holder(Principal("ada", "acme", "token:1")) != holder(other)


async def test_what_has_no_address_of_a_client_is_passed_on_as_it_is() -> None:
    """A unix socket has none."""
    passed = []

    async def app(scope: Scope, receive: Receive, send: Send) -> None:
        del receive, send
        passed.append(dict(scope))

    trusting = ClientAddress(app, Proxies(("10.0.0.0/8",)))
    header = [(b"x-forwarded-for", b"203.0.113.9")]
    unix = {"type": "http", "client": None, "headers": header}
    proxied = {"type": "http", "client": ("10.0.0.1", 4711), "headers": header}
    for scope in (unix, proxied):
        await trusting(scope, cast("Any", None), cast("Any", None))

    assert passed == [unix, {**proxied, "client": ("203.0.113.9", 0)}]


@pytest.mark.parametrize("namespace", [b"root", b"beta", b"acme/beta", b"Acme"])
async def test_a_namespace_is_the_tenant_of_the_credential(namespace: bytes) -> None:
    check_headers([(b"x-vault-namespace", b"acme/")], ADA)

    with pytest.raises(Forbidden):
        check_headers([(b"x-vault-namespace", namespace)], ADA)


@pytest.mark.parametrize("count", [0, 101])
async def test_capabilities_are_told_of_a_hundred_paths_at_most(count: int) -> None:
    body = PathsIn(paths=["transit/keys"] * count)
    call = Call(cast("Request", None), body, cast("Service", None), ADA)

    with pytest.raises(InvalidRequest, match="1 to 100"):
        sys.capabilities_self(call)


async def test_a_list_goes_on_behind_the_name_that_was_given() -> None:
    kms = SimpleNamespace(
        policy=SimpleNamespace(sees=lambda who, name: who == ADA and name != "hidden"),
        keyring=SimpleNamespace(keys=dict.fromkeys(["c", "a", "hidden", "b"])),
    )
    call = SimpleNamespace(query={"after": "a"}, service=SimpleNamespace(kms=kms), caller=ADA)

    answer = sys.list_keys(cast("Call[None]", call))

    assert msgspec.json.decode(answer.body)["data"] == {"keys": ["b", "c"]}


@pytest.mark.parametrize("scheme", [b"bearerish", b"basic", b"bearer:", b"bear"])
async def test_a_scheme_that_only_begins_like_bearer_is_none(scheme: bytes) -> None:
    assert token_of([(b"authorization", b"BEARER tok")]) == "tok"

    with pytest.raises(Unauthenticated):
        token_of([(b"authorization", scheme + b" tok")])


async def test_several_credentials_are_none_and_one_that_is_shown_twice_is_one() -> None:
    shown = (b"authorization", b"Bearer tok")

    assert token_of([shown, (b"x-api-key", b"tok")]) == "tok"
    for other in ((b"x-api-key", b"other"), (b"authorization", b"Bearer other")):
        with pytest.raises(Unauthenticated, match="Several"):
            token_of([shown, other])
