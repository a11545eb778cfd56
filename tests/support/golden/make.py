"""Makes the next golden set: ``PYTHONPATH=src:tests .venv/bin/python -m support.golden.make``, from the top.

Writes ``tests/golden/v1`` and refuses where that exists: a set is made once, by the code whose formats it
holds, and never again. A later format has a set of its own (README.md).
"""

import sys

from support.golden import make_ciphertexts, make_keys, make_service
from support.golden.manifest import V1


def main() -> int:
    if V1.exists():
        print(f"{V1} exists, and a golden set is never made again: see its README.md", file=sys.stderr)  # noqa: T201 -- a program
        return 1
    make_keys.make(V1 / "keys")
    make_ciphertexts.make(V1 / "ciphertexts")
    make_service.make(V1)
    return 0


if __name__ == "__main__":
    sys.exit(main())
