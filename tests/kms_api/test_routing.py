"""What the router finds; the paths of the Vault API are in vault_api/test_vault_api.py."""

from typing import Final

import pytest
from fastapi import FastAPI

from kms_api import app
from kms_api.routes.operations import probes
from kms_api.routing import Dispatcher
from kms_protocol.wire import PREFIX

ROUTES: Final = Dispatcher(FastAPI(), {PREFIX: app.ROUTERS, "": (probes, *app.UI)})


def template(method: str, path: str) -> str:
    """The template of the route of a path, or of the first that has other methods; empty for none."""
    return next((route.path for route in ROUTES.find(method, path)[0].values()), "")


@pytest.mark.parametrize(
    ("method", "path", "found"),
    [
        ("GET", f"{PREFIX}/jobs/dead", "/jobs/dead"),
        ("DELETE", f"{PREFIX}/jobs/dead", "/jobs/{job_id}"),
        ("HEAD", f"{PREFIX}/jobs/events", "/jobs/events"),
        ("PUT", f"{PREFIX}/encrypt", "/encrypt"),
        ("POST", "/ui/jobs/retry", "/ui/jobs/retry"),
        ("GET", "/ui/jobs/retry", "/ui/jobs/{job_id}"),
        ("GET", "/livez", "/livez"),
    ],
)
def test_the_first_template_with_the_method_is_found(method: str, path: str, found: str) -> None:
    assert template(method, path) == found


@pytest.mark.parametrize(
    "path",
    [
        "/livez\n",
        "/livez/",
        f"{PREFIX}/encrypt\n",
        f"{PREFIX}/keys/",
        f"{PREFIX}/keys/a/b",
        "/encrypt",
        "/ui/",
    ],
    ids=repr,
)
def test_a_path_with_more_or_less_than_a_template_is_unknown(path: str) -> None:
    assert template("GET", path) == ""


def test_a_parameter_is_one_segment_with_any_characters() -> None:
    assert ROUTES.find("GET", f"{PREFIX}/keys/a b\n\xe9")[1] == {"key_id": "a b\n\xe9"}
