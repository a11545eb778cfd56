"""One request at the façade, as its handlers see it."""

from collections.abc import Mapping
from dataclasses import dataclass

import msgspec
from starlette.datastructures import QueryParams
from starlette.requests import Request
from starlette.responses import Response

from kms_api import json_body
from kms_api.deps import Service
from kms_api.vault_api import models
from kms_api.vault_api.models import T
from kms_core.auth.authenticator import Authenticator
from kms_core.auth.policy import Principal


@dataclass(frozen=True, slots=True)
class VaultRequest:
    """``names`` are what stands in the path for the names of its template; ``doors`` None asks nobody."""

    request: Request
    built: Service
    doors: Authenticator | None
    who: Principal
    names: Mapping[str, str]

    @property
    def key_id(self) -> str:
        return self.names["name"]

    @property
    def query(self) -> QueryParams:
        return self.request.query_params

    async def body(self, shape: type[T]) -> T:
        """The body; none is an object without fields. Raises InvalidRequest, TooLarge."""
        return models.read(await json_body.read_bytes(self.request, self._limit_bytes), shape)

    @property
    def _limit_bytes(self) -> int:
        return self.built.settings.kms.limits.json_body_bytes


def answer(data: object, status: int = 200) -> Response:
    """An answer with the envelope of Vault around its data."""
    return Response(models.around(data), status, media_type="application/json")


def bare(body: object, status: int = 200) -> Response:
    """An answer that has none."""
    return Response(msgspec.json.encode(body), status, media_type="application/json")
