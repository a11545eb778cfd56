"""What the page is made of: templates and three small files, read once. Knows no route and no principal."""

from collections.abc import Mapping
from importlib import resources
from typing import Final

import jinja2

from kms_api.ui import filters

TYPES: Final[Mapping[str, str]] = {
    "page.css": "text/css; charset=utf-8",
    "page.js": "text/javascript; charset=utf-8",
    "icon.svg": "image/svg+xml",
}


def environment() -> jinja2.Environment:
    """Everything that a template shows is escaped; a name that it does not get is an error."""
    made = jinja2.Environment(
        loader=jinja2.PackageLoader(__name__),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    made.filters |= filters.FILTERS
    return made


def files() -> dict[str, bytes]:
    """The style, the script and the icon, by name."""
    folder = resources.files(__name__) / "static"
    return {name: (folder / name).read_bytes() for name in TYPES}
