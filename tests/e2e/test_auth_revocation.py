"""Client certificates that are revoked or expire: new connections, open ones, and jobs."""

import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Final

import httpx2 as httpx
import pytest

from kms_api.server import process
from kms_core.auth import client_certificates
from kms_core.auth.policy import Principal
from kms_core.container import Core
from kms_core.settings.model import ServerSection
from kms_protocol import wire
from kms_protocol.errors import ConfigurationError, Unauthenticated, Unavailable
from kms_protocol.wire import PREFIX
from support.core_jobs import run_job
from support.credentials import Authority, CertAndKey, authenticator_of, bearer, shown
from support.job_options import job_options
from support.revocation import EXPIRED, NAME, Revoking
from support.service import check_problem, core_of
from support.waiting import until

STATUS: Final = f"{PREFIX}/status"


def test_a_revoked_certificate_ends_its_connection_and_gets_no_other(tmp_path: Path) -> None:
    with Revoking(tmp_path, more="[kms.facade]\nenabled = true\n").start("api") as own:
        revoked, other = own.certificate(), own.certificate(file="other")
        vault = f"https://localhost:{own.port}/v1/auth/token/lookup-self"
        with own.client(revoked) as http, own.client(revoked) as of_vault, own.client(other) as beside:
            for client, url in ((http, STATUS), (of_vault, vault), (beside, STATUS)):
                assert client.get(url).status_code == 200
            own.put(own.clients.crl(revoked.cert))
            answer, of_vault_too = http.get(STATUS), of_vault.get(vault)

            check_problem(answer, 401, "unauthenticated")
            assert "revoked" in answer.json()["detail"]
            assert of_vault_too.status_code == 403
            for client, refusal in ((http, answer), (of_vault, of_vault_too)):
                assert refusal.headers["connection"] == "close"
                with pytest.raises(httpx.TransportError):  # the client connects again and is not let in
                    client.get(STATUS)
            assert beside.get(STATUS).status_code == 200
        assert own.status(other).status_code == 200
        own.put(own.clients.crl())  # a list that revokes it no more: it was on hold
        assert own.status(revoked).status_code == 200


def test_a_bad_token_does_not_end_the_connection_of_a_good_certificate(tmp_path: Path) -> None:
    with Revoking(tmp_path).start("api") as own, own.client(own.certificate()) as http:
        answer = http.get(STATUS, headers=bearer("kms_bad"))

        check_problem(answer, 401, "unauthenticated")
        assert "connection" not in answer.headers
        assert http.get(STATUS).status_code == 200


def test_an_expired_list_lets_no_certificate_in_and_tokens_work(tmp_path: Path) -> None:
    with Revoking(tmp_path).start("api") as own:
        certificate, token = own.certificate(), own.token_header("status", "metrics")
        with own.client(certificate) as http:
            assert http.get(STATUS).status_code == 200
            own.put(own.clients.crl(lasts=EXPIRED))

            check_problem(http.get(STATUS), 503, "unavailable")
            with pytest.raises(httpx.TransportError):
                own.status(certificate)
            assert "client_crl" in own.status(headers=token).json()["degraded"]
            with own.client() as plain:
                text = plain.get("/metrics", headers=token).text
            line = text.partition("\nkms_client_crl_expires_timestamp_seconds ")[2]
            assert 0 < float(line.partition("\n")[0]) < time.time()
            assert "client_crl.expired" in own.output("api")
            assert "tls.client_crl_expired" in own.output("api")
            own.put(own.clients.crl())

            assert http.get(STATUS).status_code == 200
        assert own.status(certificate).status_code == 200
        assert "client_crl" not in own.status(headers=token).json()["degraded"]


@pytest.mark.parametrize("kind", ["another authority", "no PEM", "gone", "delta", "forged"])
def test_a_new_list_that_cannot_be_used_leaves_the_old_one_in_use(tmp_path: Path, kind: str) -> None:
    with Revoking(tmp_path).start("api") as own:
        revoked, good = own.certificate(), own.certificate(file="good")
        own.put(own.clients.crl(revoked.cert))
        with own.client(good) as http:
            assert http.get(STATUS).status_code == 200
            if kind == "gone":
                own.crl.unlink()
            else:
                own.put(unusable(own, tmp_path)[kind])

            assert http.get(STATUS).status_code == 200
        assert own.status(good).status_code == 200
        with pytest.raises(httpx.TransportError):
            own.status(revoked)
        assert "tls.not_renewed" in own.output("api")
        assert "client_crl.not_read" in own.output("api")


def unusable(own: Revoking, folder: Path) -> dict[str, bytes]:
    name = "a CA for tests"  # of the same name, with another key
    return {
        "another authority": Authority(folder / "other", "another CA").crl(),
        "no PEM": b"no PEM",
        "delta": own.clients.crl(delta=True),
        "forged": Authority(folder / "forger", name).crl(),
    }


@pytest.mark.parametrize("kind", ["another authority", "no PEM", "gone", "delta", "forged", "one is missing"])
def test_a_list_that_cannot_be_used_stops_the_start_and_says_what_to_do(tmp_path: Path, kind: str) -> None:
    own = Revoking(tmp_path)
    server = own.settings.kms.server
    if kind == "gone":
        own.crl.unlink()
    elif kind == "one is missing":
        more = Authority(tmp_path / "more", "one more CA").ca_file.read_bytes()
        own.clients.ca_file.write_bytes(own.clients.ca_file.read_bytes() + more)
    else:
        own.put(unusable(own, tmp_path)[kind])

    for start in (lambda: process.server_context(server), lambda: authenticator_of(own.settings)):
        with pytest.raises(ConfigurationError, match=r"kms\.server\.client_crl.*leave client_crl out"):
            start()


@pytest.mark.parametrize("revoked", ["leaf", "intermediate"])
def test_every_certificate_of_the_chain_is_checked(tmp_path: Path, revoked: str) -> None:
    """Root and intermediate in client_ca, a list of each."""
    with Revoking(tmp_path) as own:
        middle = Authority(tmp_path / "middle", "an intermediate CA", own.clients)
        own.clients.ca_file.write_bytes(own.clients.ca_file.read_bytes() + middle.ca_file.read_bytes())
        own.put(own.clients.crl() + middle.crl())
        own.start("api")
        pair = middle.issue("leaf", NAME)
        with own.client(pair) as http:
            assert http.get(STATUS).status_code == 200
            if revoked == "leaf":
                own.put(own.clients.crl() + middle.crl(pair.cert))
            else:
                own.put(own.clients.crl(middle.ca_file) + middle.crl())

            check_problem(http.get(STATUS), 401, "unauthenticated")
            with pytest.raises(httpx.TransportError):
                own.status(pair)


@pytest.mark.parametrize("has_lists", [True, False])
def test_an_authority_removed_from_client_ca_takes_its_connections_with_it(
    tmp_path: Path, has_lists: bool
) -> None:
    with Revoking(tmp_path, has_lists=has_lists) as own:
        first = own.clients.ca_file.read_bytes()
        other = Authority(tmp_path / "other")  # re-keyed: of the same name
        second = other.ca_file.read_bytes()
        own.trust(first, second)
        own.put(own.clients.crl() + other.crl())
        own.start("api")
        with own.client(own.certificate()) as http, own.client(other.issue("good", NAME)) as beside:
            assert http.get(STATUS).status_code == 200
            assert beside.get(STATUS).status_code == 200
            own.trust(second)
            own.put(other.crl())
            answer = http.get(STATUS)

            check_problem(answer, 401, "unauthenticated")
            assert "no longer in client_ca" in answer.json()["detail"]
            assert answer.headers["connection"] == "close"
            assert beside.get(STATUS).status_code == 200


def test_of_several_lists_of_an_authority_the_newest_counts(tmp_path: Path) -> None:
    own = Revoking(tmp_path)
    certificate = own.certificate()
    old, new = own.clients.crl(certificate.cert, lasts=EXPIRED), own.clients.crl()
    for text in (old + new, new + old):
        own.put(text)
        lists = client_certificates.load_lists(own.settings.kms.server)
        assert lists
        assert lists.revoked == frozenset()
        assert lists.ends > time.time()


def test_revocation_is_looked_up_by_authority_and_number(tmp_path: Path) -> None:
    own = Revoking(tmp_path)
    certificate = own.certificate()
    identity = shown(certificate, own.clients).identity
    number, authority, key = identity.split(":")
    own.put(own.clients.crl(certificate.cert))
    found = client_certificates.build_revocations(own.settings.kms.server)

    assert found
    assert found.is_revoked(identity)
    assert not found.is_revoked(f"{number}:{'0' * 16}:{key}")
    assert not found.is_revoked(f"{number}0:{authority}:{key}")
    assert client_certificates.build_revocations(ServerSection(docs=True)) is None


# -- jobs ------------------------------------------------------------------------------------------------


@pytest.fixture
def install(tmp_path: Path, redis_url: str) -> Revoking:
    return Revoking(tmp_path, redis_url)


@pytest.fixture
def core(install: Revoking) -> Core:
    return core_of(install)


def holder(
    install: Revoking, core: Core, lasts: timedelta = timedelta(days=1)
) -> tuple[Principal, CertAndKey]:
    """The principal of a new certificate, as a request on its connection is."""
    pair = install.certificate(lasts=lasts)
    assert core.authenticator
    return core.authenticator.authenticate("", shown(pair, install.clients)), pair


def submit(core: Core, who: Principal) -> Callable[[], tuple[str, str]]:
    """Submit a job; the result runs it and tells state and error."""
    job_id = core.submitter.items(job_options(who, "encrypt", "row=1"), [wire.JobItem(plaintext=b"x")]).job_id

    def end() -> tuple[str, str]:
        run_job(job_id, core.worker_context, "w")
        job = core.worker_context.store.get(job_id, who.tenant)
        return job.state, job.error

    return end


def revoke(install: Revoking, pair: CertAndKey) -> None:
    install.put(install.clients.crl(pair.cert))


def remove_the_authority(install: Revoking, pair: CertAndKey) -> None:
    del pair
    other = Authority(install.crl.parent / "other")
    install.trust(other.ca_file.read_bytes())
    install.put(other.crl())


def wait_for_its_end(install: Revoking, pair: CertAndKey) -> None:
    ends = shown(pair, install.clients).until
    until(lambda: time.time() > ends, "the end of the certificate")


@pytest.mark.parametrize("change", [revoke, remove_the_authority, wait_for_its_end])
def test_a_queued_job_ends_as_forbidden_once_its_certificate_is_worth_nothing(
    install: Revoking, core: Core, change: Callable[[Revoking, CertAndKey], None]
) -> None:
    assert submit(core, holder(install, core)[0])() == ("succeeded", "")
    who, pair = holder(install, core, timedelta(seconds=3 if change is wait_for_its_end else 3600))
    assert who.credential.startswith("cert:builder:")
    end = submit(core, who)
    change(install, pair)

    assert end() == ("failed", "forbidden")


def test_while_the_list_is_expired_jobs_wait(install: Revoking, core: Core) -> None:
    who, _ = holder(install, core)
    end = submit(core, who)
    install.put(install.clients.crl(lasts=EXPIRED))
    assert end()[0] == "queued"
    install.put(install.clients.crl())
    until(lambda: end() == ("succeeded", ""), "the job runs after the list was renewed")


def test_a_certificate_is_refused_by_what_is_wrong_with_it(install: Revoking, core: Core) -> None:
    who, pair = holder(install, core)
    certificate = shown(pair, install.clients)
    assert core.authenticator
    assert list(core.authenticator.scopes_of(who))
    assert core.authenticator.until(who) == certificate.until
    install.put(install.clients.crl(pair.cert))
    with pytest.raises(Unauthenticated) as caught:
        core.authenticator.authenticate("", certificate)
    assert (caught.value.reason, caught.value.ends_connection) == ("revoked", True)
    install.put(install.clients.crl(lasts=EXPIRED))
    with pytest.raises(Unavailable):
        core.authenticator.authenticate("", certificate)
