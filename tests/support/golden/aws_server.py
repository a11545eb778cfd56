"""moto as a program whose keys have the ids and the material of a golden set, which AWS would not import.

``python aws_server.py <port> <remote.json>``; aws_servers.py beside this folder has the moto of other tests.
"""

import base64
import json
import sys
from pathlib import Path
from typing import Final

from moto.kms.models import kms_backends
from moto.server import main

ACCOUNT: Final = "123456789012"  # moto's own
REGION: Final = "us-east-1"


def put_key(key_id: str, material: bytes) -> None:
    """Make a key, and exchange its id and its material."""
    held = kms_backends[ACCOUNT][REGION]
    key = held.create_key("", "ENCRYPT_DECRYPT", "SYMMETRIC_DEFAULT", "golden", None)
    del held.keys[key.id]
    key.arn = key.arn.replace(key.id, key_id)
    key.id, key.key_material = key_id, material
    held.keys[key_id] = key


if __name__ == "__main__":
    port, document = sys.argv[1:]
    for name, text in json.loads(Path(document).read_text())["awskms"]["keys"].items():
        put_key(name, base64.b64decode(text))
    main(["-H", "127.0.0.1", "-p", port])
