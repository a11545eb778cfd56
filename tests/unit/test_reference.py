"""The page at /docs: all of the document is on it, links lead somewhere, and it needs nobody else."""

import re

import pytest

from kms_api import app, ui
from kms_api.openapi import document, reference_page

PAGE = document.page(app.DOCUMENTED)


@pytest.fixture(scope="module")
def html() -> str:
    template = ui.environment().get_template("reference.html")
    return template.render(
        document=PAGE, groups=reference_page.groups(PAGE), shapes=reference_page.shapes(PAGE)
    )


def test_every_operation_parameter_field_and_code_is_on_the_page(html: str) -> None:
    operations = [each for methods in PAGE["paths"].values() for each in methods.values()]
    parameters = {parameter["name"] for each in operations for parameter in each.get("parameters", ())}
    fields = {name for each in PAGE["components"]["schemas"].values() for name in each.get("properties", ())}
    codes = {code for each in PAGE["components"]["responses"].values() for code in each["x-kms-codes"]}
    said = set(re.findall(r"<code>(\w[\w-]*)</code>", html))

    assert {f'<h3 id="{each["operationId"]}">' for each in operations} <= set(
        re.findall(r"<h3 id=.*?>", html)
    )
    assert parameters | fields | codes <= said


def test_every_link_leads_to_a_place_on_the_page_or_to_this_service(html: str) -> None:
    places = re.findall(r' id="([^"]+)"', html)
    links = set(re.findall(r' href="([^"]+)"', html))

    assert len(places) == len(set(places))
    assert {link for link in links if link[1:] not in places} == {
        *("/openapi.json", "/ui", "/ui/static/page.css", "/ui/static/icon.svg")
    }


def test_page_has_no_script_and_asks_no_other_host(html: str) -> None:
    assert "<script" not in html
    assert set(re.findall(r"https?://[^/ ]+", html)) == {"http://localhost:8082"}


def test_what_stands_between_backticks_is_code_and_all_else_is_escaped(html: str) -> None:
    assert "<code>null</code> and absent mean the same" in html
    assert "`" not in re.sub(r"<pre>.*?</pre>", "", html, flags=re.DOTALL)
    assert "&lt;code" not in html
