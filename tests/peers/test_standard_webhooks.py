"""Libraries of others verify our webhooks: Standard Webhooks 1.0 in Python and JavaScript."""

import base64
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Final

import pytest

from kms_core.jobs.events.webhook import DeliveryOutcome, WebhookRequest, post
from support.programs import from_npm, locked_cache, program
from support.webhooks import Request, endpoint, receiving

PYTHON: Final = "standardwebhooks==1.3.0"
NPM: Final = "standardwebhooks@1.3.0"
VERIFY: Final = {
    "python": """
import sys, json
from standardwebhooks import Webhook
secret, body, headers = json.load(sys.stdin)
print(Webhook(secret).verify(body, headers)["type"])
""",
    "javascript": """
const { Webhook } = require("standardwebhooks");
const [secret, body, headers] = JSON.parse(require("fs").readFileSync(0, "utf8"));
console.log(new Webhook(secret).verify(body, headers).type);
""",
}
MESSAGE: Final = WebhookRequest("d-1", "j-1", '{"type": "kms.job.succeeded", "größe": 1}'.encode())
KEY: Final = bytes(range(32))
OTHER: Final = bytes(32)


def whsec(key: bytes) -> str:
    return f"whsec_{base64.b64encode(key).decode()}"


@pytest.fixture(params=VERIFY)
def verify(request: pytest.FixtureRequest) -> Callable[[str, str, dict[str, str]], str]:
    """What the library makes of a request: the type of its event, or an error."""
    if request.param == "python":
        with locked_cache(PYTHON) as folder:
            if not (folder / "standardwebhooks").is_dir():
                pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target"]
                if subprocess.run([*pip, str(folder), PYTHON], check=False).returncode:
                    pytest.skip(f"pip could not fetch {PYTHON}")
        argv, place = [sys.executable, "-c", VERIFY["python"]], {"PYTHONPATH": str(folder)}
    else:
        module = from_npm("standardwebhooks", "node_modules/standardwebhooks", NPM)
        argv, place = [program("node"), "-e", VERIFY["javascript"]], {"NODE_PATH": str(module.parent)}

    def verified(secret: str, body: str, headers: dict[str, str]) -> str:
        given = json.dumps([secret, body, headers])
        done = subprocess.run(argv, env=place, input=given, capture_output=True, text=True, check=False)
        return done.stdout.strip() if done.returncode == 0 else done.stderr

    return verified


def sent(folder: Path, secret: Path, previous: Path | None) -> Request:
    with receiving(None) as receiver:
        found = endpoint(
            folder,
            receiver.url("127.0.0.1", "http"),
            None,
            secret_file=secret,
            previous_secret_file=previous,
            kms_headers=False,
        )
        assert post(found, MESSAGE) == DeliveryOutcome("delivered")
    return receiver.requests[0]


def test_requests_are_verified_by_either_secret_and_by_no_other(
    tmp_path: Path, verify: Callable[[str, str, dict[str, str]], str]
) -> None:
    new, old = tmp_path / "new", tmp_path / "old"
    new.write_text(whsec(KEY) + "\n")
    old.write_text("a text of the time before whsec_\n")
    request = sent(tmp_path, new, old)
    body = request.body.decode()

    for key in (KEY, old.read_bytes().strip()):
        assert verify(whsec(key), body, request.headers) == "kms.job.succeeded"
    for secret, changed in ((OTHER, body), (KEY, body.replace("1", "2"))):
        assert "No matching signature" in verify(whsec(secret), changed, request.headers)
    late = request.headers | {"webhook-timestamp": "1614265330"}
    assert "too old" in verify(whsec(KEY), body, late)
