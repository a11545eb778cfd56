"""The vendor's own client (4.22, which speaks the dialect of 4.x) and the double understand each other.

Runs against the server at ``COSMIAN_KMS_URL`` where that is of 4.x. The client aborts the interpreter that
it is used in, at its end: so it runs in one of its own.
"""

import importlib.util
import json
import os
import platform
import subprocess
import sys
from typing import Final

import pytest

from kms_core.backends.cosmian.backend import CosmianCipher, CosmianKey
from support.contract.cosmian_ciphers import AAD, SECRET
from support.contract.cosmian_double import OLD
from support.contract.rig_cosmian import cosmian, server_url

PROGRAM: Final = """
import asyncio, json, os, sys
from cosmian_kms import KmsClient

async def main():
    client = KmsClient(sys.argv[1])
    uid = await client.create_symmetric_key(256, tags=["of", "a kind"])
    sealed = await client.encrypt(b"salary", uid)
    parts = sealed.data(), sealed.iv_counter_nonce(), sealed.authenticated_encryption_tag()
    opened = bytes(await client.decrypt(parts[0], uid, parts[1], parts[2]))
    try:
        await client.decrypt(parts[0], uid, parts[1], bytes(16))
        refusal = ""
    except Exception as exc:
        refusal = str(exc)
    print(json.dumps({"uid": uid, "sizes": [len(part) for part in parts], "opened": opened.decode(),
                      "refusal": refusal}), flush=True)

asyncio.run(main())
os._exit(0)
"""


@pytest.fixture
def told() -> dict[str, object]:
    """What the vendor's client says of one round."""
    if importlib.util.find_spec("cosmian_kms") is None:
        if os.environ.get("CI") and platform.machine() == "x86_64":  # there are no wheels for others
            pytest.fail("cosmian-kms is not installed, and CI must not skip what compares with it")
        pytest.skip("cosmian-kms is not installed")
    argv = [sys.executable, "-c", PROGRAM, server_url(OLD)]
    done = subprocess.run(argv, capture_output=True, text=True, check=True, timeout=60)
    found: dict[str, object] = json.loads(done.stdout)
    return found


@pytest.mark.cosmian
def test_the_vendors_client_makes_a_key_seals_and_opens(told: dict[str, object]) -> None:
    assert told["sizes"] == [len(b"salary"), 12, 16]
    assert told["opened"] == "salary"
    assert "Cryptographic error" in str(told["refusal"])


@pytest.mark.cosmian
def test_a_key_that_the_vendors_client_made_wraps_for_us(told: dict[str, object]) -> None:
    cipher = CosmianCipher(CosmianKey(cosmian(server_url(OLD)), str(told["uid"])))

    assert cipher.decrypt(cipher.encrypt(SECRET, "1", AAD), "1", AAD) == SECRET
