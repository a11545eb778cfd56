"""A caller of the Vault API who may not see a key learns nothing from how long its backend takes."""

from collections.abc import Callable, Iterable
from typing import Final

import pytest

from agekms import kms_over
from kms_api.facade import door
from kms_api.facade.door import Extra
from kms_core.errors import KmsError, UnknownKey
from kms_core.policy import ByScopes, Principal
from kms_core.scopes import Scope
from memory_kms import memory_backend

WHO: Final = Principal("ada", "default", "token:x")
KEYS: Final = ("unseen", "no-such-key")


class Stands:
    """A credential for everything with other keys."""

    def scopes_of(self, who: Principal) -> Iterable[Scope]:
        del who
        return [Scope.parse("* key=default")]


CALLS: Final[dict[str, Callable[..., object]]] = {
    "encrypt": lambda kms, key: door.encrypt(kms, WHO, b"x", Extra(), key_id=key),
    "data_key": lambda kms, key: door.data_key(kms, WHO, 32, Extra(), key_id=key),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_backend_of_an_unseen_key_is_not_asked(name: str) -> None:
    """The answer does not wait for a peer: it is the one for a key that does not exist."""
    own, unseen = memory_backend(), memory_backend()
    kms = kms_over(own[0], {"unseen": unseen[0]}, policy=ByScopes(Stands(), {}))
    unseen[1].calls.clear()
    told: list[str] = []
    for key in KEYS:
        with pytest.raises(KmsError) as caught:
            CALLS[name](kms, key)
        assert type(caught.value) is UnknownKey
        told.append(caught.value.detail)

    assert told[0] == told[1]
    assert not unseen[1].calls
    CALLS[name](kms, "default")
