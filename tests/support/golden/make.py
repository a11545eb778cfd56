"""The makers of golden files are in the history of this folder: a set is made once, and never again.

``v1/`` was made by commit 610fe5f's code. A later format gets a set of its own, made by the commit that
changes the format (tests/golden/README.md).
"""

import sys


def main() -> int:
    """Refuse."""
    print("A golden set is never made again: see tests/golden/README.md", file=sys.stderr)  # noqa: T201 -- a program
    return 1


if __name__ == "__main__":
    sys.exit(main())
