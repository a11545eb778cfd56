"""The double of a Cosmian KMS server answers as the real servers did whose answers were recorded."""

from typing import Any

import httpx2 as httpx
import pytest

from support.contract.cosmian_double import CosmianDouble
from support.contract.cosmian_exchanges import Play, load, scenes, shape


@pytest.mark.parametrize("scene", scenes())
def test_the_double_answers_each_request_as_the_real_server_did(scene: str) -> None:
    found = load(scene)
    token = "c2VjcmV0"
    users = {token: "admin"} if scene == "credentials" else None
    with CosmianDouble(found["version"], users) as double, client_of(double) as client:
        play = Play(client, token)
        said = [(step["name"], play.step(step)) for step in found["steps"]]

    assert [
        {"name": name, "status": answer.status, "type": answer.type, "body": shape(answer.body)}
        for name, answer in said
    ] == [_expected(step) for step in found["steps"]]


def client_of(double: CosmianDouble) -> httpx.Client:
    return httpx.Client(base_url=double.url, trust_env=False)


def _expected(step: dict[str, Any]) -> dict[str, Any]:
    answer = step["answer"]
    return {"name": step["name"], **answer, "body": shape(answer["body"])}
