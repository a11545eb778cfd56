"""Secrets go through everything the service does; afterwards they are nowhere but where the user pointed."""

import json
import os
from base64 import b64encode
from pathlib import Path

from canary import forms
from service import Json, Service, b64, unb64

WORDS = {
    name: f"Kanarienvogel-{name}-{os.urandom(6).hex()}" for name in ("plaintext", "context", "token", "file")
}


def found(folder: Path) -> list[str]:
    """Which word is in which file, the folder of the user's own files left out."""
    hits = []
    for path in folder.rglob("*"):
        if not path.is_file() or (folder / "state" / "files") in path.parents:
            continue
        data = path.read_bytes()
        hits += [
            f"{name} in {path}" for name, word in WORDS.items() if any(form in data for form in forms(word))
        ]
    return hits


def data_key(service: Service, headers: dict[str, str]) -> bytes:
    made = service.post("/generate-key", {"context": {"who": WORDS["context"]}}, headers=headers).json()
    return unb64(made["plaintext"])


def singles(service: Service, headers: dict[str, str]) -> None:
    context = {"who": WORDS["context"]}
    sealed = service.post(
        "/encrypt", {"plaintext": b64(WORDS["plaintext"].encode()), "context": context}, headers=headers
    )
    body = {"ciphertext": sealed.json()["ciphertext"], "context": context}
    assert service.post("/decrypt", body, headers=headers).status_code == 200
    assert service.post("/decrypt", body | {"context": {"who": WORDS["context"] + "x"}}).status_code == 400
    assert service.post("/rewrap", body | {"new_context": {"now": WORDS["context"]}}).status_code == 200
    items: list[Json] = [{key: body[key] for key in body}] * 2
    assert service.post("/batch", {"operation": "decrypt", "items": items}).json()["failed"] == 0


def refusals(service: Service, headers: dict[str, str]) -> None:
    for body in (
        {"plaintext": WORDS["plaintext"]},
        {"plaintext": b64(WORDS["plaintext"].encode()), "context": WORDS["context"]},
        {"plaintext": b64(WORDS["plaintext"].encode()), "key_id": WORDS["token"]},
        {WORDS["plaintext"]: WORDS["context"]},
    ):
        assert service.post("/encrypt", body, headers=headers).status_code in {404, 422}
    service.post("/encrypt", content=WORDS["plaintext"].encode(), headers=headers)
    service.http.get(f"/{WORDS['token']}?token={WORDS['token']}", headers={"Host": WORDS["token"]} | headers)
    service.http.get(f"/api/v1/kms/jobs?state={WORDS['context']}&cursor={WORDS['token']}", headers=headers)


def bulk(service: Service) -> None:
    plaintext, context = WORDS["plaintext"].encode(), {"who": WORDS["context"]}
    items = [{"plaintext": b64(plaintext), "context": context}] * 3
    sealed = service.submit(
        {"kind": "encrypt", "items": items, "context": context}, Idempotency_Key=WORDS["token"]
    )
    service.wait(sealed, "succeeded")
    lines = [json.loads(line) for line in service.result(sealed).splitlines()]
    again = [{"ciphertext": line["ciphertext"], "context": context} for line in lines]
    back = service.submit({"kind": "decrypt", "items": [*again, {"ciphertext": b64(plaintext)}]})
    service.wait(back, "failed")
    assert plaintext in unb64(json.loads(service.result(back).splitlines()[0])["plaintext"])


def uploads(service: Service) -> None:
    plaintext, context = WORDS["plaintext"].encode() * 5_000, f"who={WORDS['context']}"
    sealed = service.upload("encrypt", plaintext, context)
    service.wait(sealed, "succeeded")
    back = service.upload("decrypt", service.result(sealed), context)
    service.wait(back, "succeeded")
    assert service.result(back) == plaintext
    service.wait(service.upload("decrypt", service.result(sealed), "who=other"), "failed")


def file_jobs(service: Service) -> None:
    (service.files / WORDS["file"]).write_bytes(WORDS["plaintext"].encode() * 5_000)
    here, context = f"file://{service.files}/", {"who": WORDS["context"]}
    for kind, source, target in (
        ("encrypt", WORDS["file"], "sealed"),
        ("decrypt", "sealed", WORDS["file"] + "-back"),
    ):
        job = {"kind": kind, "source": here + source, "target": here + target, "context": context}
        service.wait(service.submit(job), "succeeded")
    job = {"kind": "encrypt", "source": here + WORDS["file"], "target": here + "sealed", "context": context}
    assert service.wait(service.submit(job), "failed")["error"] == {"code": "target_exists"}


def test_secrets_rest_nowhere_but_where_the_user_pointed(tmp_path: Path) -> None:
    settings = '[kms.age]\ndata_keys = true\n[kms.log]\nlevel = "debug"\n'
    headers = {"Authorization": f"Bearer {WORDS['token']}", "Cookie": f"session={WORDS['token']}"}
    with Service(tmp_path, settings) as service:
        service.start()
        key = data_key(service, headers)
        singles(service, headers)
        refusals(service, headers)
        bulk(service)
        uploads(service)
        file_jobs(service)

        assert found(tmp_path) == []
        assert WORDS["context"].encode() not in service.http.get("/metrics").content
        memory = service.state / "valkey"
        assert any(memory.rglob("*.aof")), "the append-only file holds all that Redis was ever told"
        holders = [path for path in tmp_path.rglob("*") if path.is_file() and key in path.read_bytes()]
        assert holders == []

    assert found(tmp_path) == []  # nor after the end
    assert "kms.run" in service.output("worker")


def test_the_search_finds_what_it_looks_for(tmp_path: Path) -> None:
    word = WORDS["plaintext"].encode()
    texts = [
        word,
        word.hex().encode(),
        b'{"plaintext": "%s"}' % b64encode(word),
        b64encode(b"x" + word + b"y"),
        b64encode(b"xy" + word),
    ]
    for number, text in enumerate(texts):
        (tmp_path / f"{number}").write_bytes(b"before " + text + b" after")

    assert len(found(tmp_path)) == len(texts)
