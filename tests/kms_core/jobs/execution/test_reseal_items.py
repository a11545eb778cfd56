"""Items under a new file key: the same plaintext and another payload."""

import pytest

from support.service import Service, b64, unb64


def payload(sealed: bytes) -> bytes:
    return sealed[sealed.index(b"\n--- ") + 49 :]


@pytest.mark.parametrize("path", ["/jobs", "/batch"])
def test_resealed_items_have_another_payload_and_the_same_plaintext(service: Service, path: str) -> None:
    old = [service.encrypt(b"%d" % number, "env=prod") for number in range(3)]
    items = [{"ciphertext": b64(sealed), "context": "env=prod"} for sealed in old]
    items.append({"ciphertext": b64(old[0]), "context": "env=test"})
    if path == "/jobs":
        job_id = service.submit({"kind": "reseal", "items": items})
        service.wait(job_id, "failed")
        told = service.lines(job_id)
    else:
        told = service.post(path, {"operation": "reseal", "items": items}).json()["results"]

    new = [unb64(one["ciphertext"]) for one in told[:3]]
    assert [service.decrypt(sealed, "env=prod") for sealed in new] == [b"0", b"1", b"2"]
    assert not {payload(sealed) for sealed in old} & {payload(sealed) for sealed in new}
    assert told[3]["error"] == {"code": "decrypt_failed"}


def test_items_go_to_a_new_context(service: Service) -> None:
    old = service.encrypt(b"x", "env=prod")
    item = {"ciphertext": b64(old), "context": "env=prod"}

    job_id = service.submit({"kind": "reseal", "items": [item], "new_context": "env=test"})
    service.wait(job_id, "succeeded")

    assert service.decrypt(unb64(service.lines(job_id)[0]["ciphertext"]), "env=test") == b"x"
