"""Seals or opens one file with pyrage, as a program of its own.

    python -m benchmarks.drive_pyrage {seal|open|read} IDENTITY_FILE SOURCE TARGET

``-`` is a standard stream. ``read`` opens in memory, by ``pyrage.decrypt``, and writes nothing.
"""

import sys
from pathlib import Path

import pyrage


def main(operation: str, identity_file: str, source: str, target: str) -> None:
    identity = pyrage.x25519.Identity.from_str(Path(identity_file).read_text().split()[-1])
    if operation == "read":
        pyrage.decrypt(Path(source).read_bytes(), [identity])
    elif operation == "seal":
        recipients = [identity.to_public()]
        if source == "-":
            pyrage.encrypt_io(sys.stdin.buffer, sys.stdout.buffer, recipients)
        else:
            pyrage.encrypt_file(source, target, recipients)
    elif source == "-":
        pyrage.decrypt_io(sys.stdin.buffer, sys.stdout.buffer, [identity])
    else:
        pyrage.decrypt_file(source, target, [identity])


if __name__ == "__main__":
    main(*sys.argv[1:])
