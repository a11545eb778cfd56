"""The access rule of each route, by method and path."""

from collections.abc import Iterable
from typing import Final

from kms_api import app
from kms_api.routes import operations
from kms_api.routing import Routes, Rule

Rules = dict[tuple[str, str], Rule]


def rules_of(parts: Iterable[Routes]) -> Rules:
    return {(route.method, route.path): route.rule for part in parts for route in part.declared}


RULES: Final = rules_of((*app.ROUTERS, operations.probes))
"""Of the API; only probes have no prefix."""
UI_RULES: Final = rules_of((*app.UI, *app.REFERENCE))
VAULT_RULES: Final = rules_of(app.VAULT)
