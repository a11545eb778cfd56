"""Jobs over many files through the whole service: API, queue, workers, and what is told of them."""

import json
from typing import Any

import pytest

from support.service import CANARY, Json, Service, check_problem

CONTEXT = "env=prod"


def fill(service: Service, folder: str, count: int) -> str:
    """Files below a folder of the root; its URL."""
    for number in range(count):
        path = service.files / folder / f"{number % 7}" / f"{number}.txt"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    return f"file://{service.files}/{folder}"


def lines(service: Service, job_id: str) -> list[Json]:
    answer = service.get(f"/jobs/{job_id}/result")
    assert answer.headers["content-type"] == "application/x-ndjson"
    return [json.loads(line) for line in answer.text.splitlines()]


def ask(kind: str, source: str, **more: Any) -> Json:  # noqa: ANN401 -- any field
    return {"kind": kind, "source": source, "context": CONTEXT, **more}


def test_tree_goes_there_and_back_on_several_workers(service: Service) -> None:
    here = fill(service, "many", 1200)

    there = service.submit(ask("encrypt", f"{here}/**/*.txt", target=f"{here}-sealed/", priority="low"))
    job = service.wait(there, "succeeded")
    dry = service.submit(ask("rewrap", f"{here}-sealed/**", dry_run=True))
    service.wait(dry, "succeeded")
    back = service.submit(ask("decrypt", f"{here}-sealed/**/*.age", target=f"{here}-back/"))
    service.wait(back, "succeeded")

    told = lines(service, there)
    assert job["progress"] == job["progress"] | {"items": 1200, "items_done": 1200, "items_failed": 0}
    assert job["priority"] == "low"
    assert "report" not in job
    assert [line["index"] for line in told] == list(range(1200))
    assert told[0] == {
        "index": 0,
        "source": f"{here}/0/0.txt",
        "target": f"{here}-sealed/0/0.txt.age",
    }
    assert service.job(dry)["report"] == {
        "dry_run": True, "changed": 0, "newest": 1200, "foreign": 0, "failed": 0, "older": [],
    }  # fmt: skip
    assert {"index": 5, "outcome": "newest"}.items() <= lines(service, dry)[5].items()
    for number in (0, 499, 500, 1199):
        path = service.files / "many-back" / f"{number % 7}" / f"{number}.txt"
        assert path.read_bytes() == b"%d" % number
    part = service.get(f"/jobs/{there}/result", headers={"Range": "bytes=0-9"})
    assert (part.status_code, part.text) == (206, '{"index":0')


def test_the_same_key_is_the_same_tree(idle: Service) -> None:
    here = fill(idle, "once", 1)
    body = ask("rewrap", f"{here}/**", overwrite=True)
    key = {"Idempotency-Key": "trees"}

    first = idle.post("/jobs", body, headers=key).json()["job_id"]

    assert idle.post("/jobs", body | {"target": body["source"]}, headers=key).json()["job_id"] == first
    for change in ({"dry_run": True}, {"source": f"{here}/*"}):
        check_problem(idle.post("/jobs", body | change, headers=key), 409, "idempotency_conflict")


@pytest.mark.parametrize(
    ("fields", "status", "code"),
    [
        ({"source": f"file:///{CANARY}/**", "target": "file:///{root}/x/"}, 403, "path_refused"),
        ({"source": "file://{root}/**"}, 422, "invalid_request"),
        ({"source": "file://{root}/**", "target": "file://{root}/x"}, 422, "invalid_request"),
        (
            {"source": "file://{root}/**", "target": "file://{root}/x/", "dry_run": True},
            422,
            "invalid_request",
        ),
        (
            {"source": "file://{root}/**", "target": "file://{root}/x/", "rate_per_s": 1},
            422,
            "invalid_request",
        ),
        ({"source": "file://{root}/**.x", "target": "file://{root}/x/"}, 422, "invalid_request"),
        ({"source": "s3://bucket/**", "target": "file://{root}/x/"}, 403, "path_refused"),
        ({"source": "file://{root}/**", "target": "s3://bucket/x/"}, 403, "path_refused"),
    ],
    ids=str,
)
def test_tree_that_cannot_be_is_refused_before_it_is_a_job(
    idle: Service, fields: Json, status: int, code: str
) -> None:
    named = {
        name: value.format(root=idle.files) if isinstance(value, str) else value
        for name, value in fields.items()
    }

    check_problem(idle.post("/jobs", {"kind": "encrypt"} | named), status, code)


def test_openapi_page_describes_them(service: Service) -> None:
    page = service.http.get("/openapi.json").json()["components"]["schemas"]

    assert {"dry_run", "priority", "overwrite"} <= page["JobIn"]["properties"].keys()
    assert "``*``" in page["JobIn"]["description"]
    assert page["Report"]["properties"].keys() >= {"changed", "newest", "foreign", "failed", "older"}
    assert "reseal" in json.dumps(page["JobIn"]["properties"]["kind"])
