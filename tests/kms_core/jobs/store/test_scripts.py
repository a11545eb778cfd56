"""What is sent of the library of scripts: the definitions that a script uses, and no others."""

import pytest

from kms_core.jobs.store.scripts import SCRIPTS, used

P = "local P = 'x:'\n"
H = "function P.h()\n  return 1\nend\n"
FIRST = "local first, second = 1, 2\n\n"
F = "local function f(key)\n  return P .. key  -- not g\nend\n"
G = "local function g() return f(first) end\n"
LIBRARY = f"-- Comments name f and g.\n{P}{H}{FIRST}{F}{G}"


@pytest.mark.parametrize(
    ("body", "sent"),
    [
        ("return 1  -- f", ""),
        ("return second", FIRST),
        ("return f('a')", P + H + F),  # what is added to P belongs to it
        ("return g()", LIBRARY.partition("\n")[2]),
    ],
)
def test_definitions_that_a_script_uses(body: str, sent: str) -> None:
    assert used(LIBRARY, body) == sent


def test_each_script_tells_its_cost() -> None:
    assert len(SCRIPTS) > 15
    for text in SCRIPTS.values():
        assert text.startswith("#!lua")
        assert "O(" in text
