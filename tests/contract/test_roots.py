"""Every backend as the root of sealed key files: OpenBao, AWS KMS by moto, Cosmian by its double, Age."""

import pytest

from kms_core.envelope.sealed_files import FileSealer
from kms_core.keyring import Key
from kms_protocol.errors import BackendUnavailable, ConfigurationError
from support.contract.rigs import Rig

CONTENT = b"# created: 2027-01-31T12:00:00Z\nAGE-SECRET-KEY-1TEST\n"


def sealer(rig: Rig) -> FileSealer:
    return FileSealer(lambda: {"root": Key("root", rig.backend), "other": Key("other", rig.other)}, list)


def test_a_root_opens_what_it_sealed_also_after_its_rotation(rig: Rig) -> None:
    first = sealer(rig).seal("payroll", CONTENT, "root")
    rig.rotate()
    again = sealer(rig).seal_again("payroll", CONTENT + b"more\n", first)

    assert sealer(rig).open("payroll", first) == CONTENT
    assert sealer(rig).open("payroll", again) == CONTENT + b"more\n"


def test_another_key_of_the_same_server_opens_nothing(rig: Rig) -> None:
    sealed = sealer(rig).seal("payroll", CONTENT, "root")
    exchanged = FileSealer(lambda: {"root": Key("root", rig.other)}, list)

    with pytest.raises(ConfigurationError, match="by another root"):
        exchanged.open("payroll", sealed)


def test_a_root_that_is_broken_is_away_and_comes_back(rig: Rig) -> None:
    """An Age key whose files are gone goes on with what it read."""
    sealed = sealer(rig).seal("payroll", CONTENT, "root")
    rig.break_it()
    if rig.backend.name == "age":
        assert sealer(rig).open("payroll", sealed) == CONTENT
    else:
        with pytest.raises(BackendUnavailable):
            sealer(rig).open("payroll", sealed)

    rig.mend()
    assert sealer(rig).open("payroll", sealed) == CONTENT
