"""Exchanges with real Cosmian KMS servers, and playing them again: to another server, or to the double.

A file of ``cosmian_exchanges/`` is a scene: steps that follow each other, each a request and the answer that
the server named under ``origin`` gave. ``{run}`` is what makes identifiers fresh, ``{token}`` our API token,
other names stand for what an earlier step took from its answer (``take``: name to tag or member). Protected
headers of JWE stand decoded in answers.

To record again: ``python tests/support/contract/cosmian_exchanges.py http://127.0.0.1:9998 [scene …]``, with
the API token, if there is one, in ``COSMIAN_API_KEY``.
"""

import base64
import json
import os
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import httpx2 as httpx

FOLDER: Final = Path(__file__).parent / "cosmian_exchanges"
_PLACE: Final = re.compile(r"\{([a-z_0-9]+)\}")
Json = Any


@dataclass(frozen=True)
class Answer:
    """What came back; ``body`` is JSON where it can be read so, else text."""

    status: int
    type: str
    body: Json


class Play:
    """One run through a scene, against the server of ``client``."""

    def __init__(self, client: httpx.Client, token: str = "") -> None:
        self._client = client
        self._run = os.urandom(4).hex()
        tag = f"tag-{self._run}".encode().hex().upper()
        self._taken = {"run": self._run, "tag_hex": tag, "token": token}

    def step(self, step: dict[str, Json]) -> Answer:
        """Send one request; keep what the step takes from the answer."""
        headers = {name: self._filled(value) for name, value in step.get("headers", {}).items()}
        content = self._filled(json.dumps(step["body"])) if "body" in step else None
        headers["Content-Type"] = "application/json"
        path = self._filled(step["path"])
        answer = self._client.request(step["method"], path, content=content, headers=headers)
        body = _body(answer)
        for name, tag in step.get("take", {}).items():
            self._taken[name] = next(_values(body, tag))
        return Answer(answer.status_code, answer.headers.get("Content-Type", ""), self._unfilled(body))

    def _filled(self, text: str) -> str:
        return _PLACE.sub(lambda found: self._taken.get(found[1], found[0]), text)

    def _unfilled(self, body: Json) -> Json:
        if isinstance(body, dict) and "protected" in body:
            body = {**body, "protected": _octets(body["protected"]).decode()}
        text = json.dumps(body).replace(self._taken["tag_hex"], "{tag_hex}")
        return json.loads(text.replace(self._run, "{run}"))


def scenes() -> list[str]:
    return sorted(path.stem for path in FOLDER.glob("*.json"))


def load(scene: str) -> dict[str, Json]:
    found: dict[str, Json] = json.loads((FOLDER / f"{scene}.json").read_text())
    return found


def shape(body: Json) -> Json:
    """A body with random bytes, times and places in a request replaced by what they are like."""
    match body:
        case {"type": "ByteString" | "DateTime" as kind, "value": str(value), **rest}:
            return {**rest, "type": kind, "value": _like(kind, value)}
        case {"protected": str()}:
            sizes = {name: f"{len(_octets(body[name]))} bytes" for name in ("iv", "ciphertext", "tag")}
            return {**body, **sizes}
        case dict():
            return {name: shape(value) for name, value in body.items()}
        case list():
            return [shape(value) for value in body]
        case str():
            return re.sub(r" at line \d+ column \d+$", " at line 9 column 9", body)
    return body


def _like(kind: str, value: str) -> str:
    if kind == "DateTime":
        return re.sub(r"\d", "9", value)
    if "{tag_hex}" in value:
        return "tags, in any order"
    return f"{len(bytes.fromhex(value))} bytes"


def _body(answer: httpx.Response) -> Json:
    try:
        return answer.json()
    except ValueError:
        return answer.text


def _values(body: Json, name: str) -> Iterator[str]:
    """The values under a tag, or a member of this name, anywhere in a body."""
    match body:
        case {"tag": str(tag), "value": str(value)} if tag == name:
            yield value
        case dict():
            if isinstance(body.get(name), str):
                yield body[name]
            for each in body.values():
                yield from _values(each, name)
        case list():
            for each in body:
                yield from _values(each, name)


def _octets(text: str) -> bytes:
    return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))


def record(url: str, scene: str, token: str) -> None:
    """Play a scene against a real server, and put its answers into the file."""
    found = load(scene)
    with httpx.Client(base_url=url, trust_env=False) as client:
        play = Play(client, token)
        found["version"] = client.get("/version").json()
        for step in found["steps"]:
            answer = play.step(step)
            step["answer"] = {"status": answer.status, "type": answer.type, "body": answer.body}
    head = {name: value for name, value in found.items() if name != "steps"}
    steps = ",\n".join(json.dumps(step) for step in found["steps"])
    text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "steps": [\n{steps}\n]}}\n'
    (FOLDER / f"{scene}.json").write_text(text)


if __name__ == "__main__":
    for wanted in sys.argv[2:] or scenes():
        record(sys.argv[1], wanted, os.environ.get("COSMIAN_API_KEY", ""))
