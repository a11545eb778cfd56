"""Sizes of single calls."""

from collections.abc import Callable
from typing import Final

import pytest

from kms_api.routes.secrets import check_ciphertext, check_plaintext
from kms_protocol.errors import TooLarge

MIB: Final = 1024 * 1024


@pytest.mark.parametrize(
    ("check", "most"), [(check_plaintext, MIB), (check_ciphertext, MIB + 64 * 1024)], ids=["plain", "sealed"]
)
def test_a_value_above_its_limit_is_refused(check: Callable[[bytes], None], most: int) -> None:
    check(bytes(most))

    with pytest.raises(TooLarge, match=f"is above {most} bytes"):
        check(bytes(most + 1))
