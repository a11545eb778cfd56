import importlib
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from kms_core import keyring
from kms_core.age import header, x25519
from kms_core.backends import SCHEMES
from kms_core.backends.age import AgeBackend, open_key
from kms_core.backends.age_settings import AgeSection
from kms_core.backends.remote import RemoteBackend, SharingBackend
from kms_core.backends.wrap_keys import WrapKeys
from kms_core.envelope import binding
from kms_core.envelope.binding import KeyRef, version_of
from kms_core.keyring import Keyring
from kms_core.settings.model import Settings
from kms_protocol.context import Context
from kms_protocol.errors import ConfigurationError, UnknownKey
from support.age_kms import ADA, ROW_7, age_backend, kms_over, write_pair
from support.memory_kms import NO_RETRIES, MemoryCipher, memory_backend
from support.settings_files import read

OWN: Final = x25519.X25519Identity.generate()
PAYROLL: Final = x25519.X25519Identity.generate()
NEXT: Final = x25519.X25519Identity.generate()


def settings_of(tmp_path: Path, text: str = "") -> Settings:
    return read(tmp_path, text.format(tmp=tmp_path), state_dir=tmp_path / "state")


def built(tmp_path: Path, text: str = "") -> Keyring:
    return keyring.build(settings_of(tmp_path, text))


def refusal(tmp_path: Path, text: str) -> str:
    with pytest.raises(ConfigurationError) as caught:
        built(tmp_path, text)
    return caught.value.detail


@pytest.fixture(autouse=True)
def key_files(tmp_path: Path) -> None:
    """The key of the state directory, and another."""
    write_pair(tmp_path / "state/age", OWN)
    write_pair(tmp_path / "payroll", PAYROLL)


# -- which key ---------------------------------------------------------------------------------------

URI: Final = "age://{tmp}/payroll/private_key.txt"
MAPPED: Final = f'[kms.keys]\npayroll = "{URI}"'


@pytest.mark.parametrize(
    ("text", "keys", "default"),
    [
        ("", {"default": OWN}, "default"),
        (MAPPED, {"default": OWN, "payroll": PAYROLL}, "default"),
        (f'[kms.keys]\npayroll = ["{URI}?seal=true"]', {"default": OWN, "payroll": PAYROLL}, "default"),
        ('[kms]\ndefault_key_id = "main"', {"main": OWN}, "main"),
        (f'[kms]\ndefault_key_id = "payroll"\n{MAPPED}', {"payroll": PAYROLL}, "payroll"),
        (f'[kms.keys]\ndefault = "{URI}"', {"default": PAYROLL}, "default"),
    ],
    ids=["no settings", "mapped", "a list of one", "another default", "a mapped default", "default mapped"],
)
def test_settings_say_which_keys_there_are_and_which_is_the_default(
    tmp_path: Path, text: str, keys: dict[str, x25519.X25519Identity], default: str
) -> None:
    if OWN not in keys.values():
        (tmp_path / "state/age/private_key.txt").unlink()  # a mapped default needs no key of its own
    ring = built(tmp_path, text)

    expected = {key_id: version_of(identity.recipient) for key_id, identity in keys.items()}
    assert {key_id: key.backend.versions()[-1].version for key_id, key in ring.keys.items()} == expected
    assert ring.named(None) is ring.named(default) is ring.default
    assert {(key.others, key.retired) for key in ring.keys.values()} == {((), ())}


@pytest.mark.parametrize("key_id", ["other", "", "DEFAULT", "default ", "age:///etc/passwd"])
def test_an_unknown_id_is_unknown(tmp_path: Path, key_id: str) -> None:
    with pytest.raises(UnknownKey):
        built(tmp_path).named(key_id)


@pytest.mark.parametrize("accepted", [True, False])
def test_every_key_knows_whether_it_takes_foreign_files(tmp_path: Path, *, accepted: bool) -> None:
    text = f"[kms.age]\naccept_foreign = {str(accepted).lower()}\n"
    keys = built(tmp_path, text + MAPPED)

    assert {key.accept_foreign for key in keys.keys.values()} == {accepted}


def test_a_key_names_the_version_in_use(tmp_path: Path) -> None:
    write_pair(tmp_path / "state/age", OWN, NEXT, current=OWN)

    assert built(tmp_path).default.ref("acme") == KeyRef("acme", "default", version_of(OWN.recipient), "age")


# -- what is refused at start ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("uris", "said"),
    [
        ('["age://{tmp}/payroll/private_key.txt?seal=false"]', "name a URI that encrypts"),
        ('"age://{tmp}/payroll/private_key.txt?seal=no"', "seal is true or false"),
        ('"age://{tmp}/payroll/private_key.txt?seal=true&seal=false"', "seal is true or false"),
        (
            '["age://{tmp}/payroll/private_key.txt", "age://{tmp}/state/age/private_key.txt"]',
            "each backend once",
        ),
        ("[]", "name a URI that encrypts"),
    ],
)
def test_several_backends_of_a_key_are_checked(tmp_path: Path, uris: str, said: str) -> None:
    assert said in refusal(tmp_path, f"[kms.keys]\npayroll = {uris}")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (
            '[kms.keys]\npayroll = "vualt://v/keys/x"',
            "key 'payroll' names the backend 'vualt', which is not one of: age",
        ),
        (
            '[kms.keys]\npayroll = "age://user:hunter2@host/private_key.txt"',
            "The URI of key 'payroll' holds a password: put it into a file instead",
        ),
        ('[kms.keys]\npayroll = "age://host/private_key.txt"', "An age key is age:///"),
        ('[kms.keys]\npayroll = "age://{tmp}/gone"', "Cannot read the age key file {tmp}/gone"),
    ],
    ids=["scheme", "password", "host", "missing file"],
)
def test_a_wrong_uri_is_refused(tmp_path: Path, text: str, said: str) -> None:
    refused = refusal(tmp_path, text)

    assert refused.startswith(said.format(tmp=tmp_path))
    assert "hunter2" not in refused


def test_a_missing_pair_of_the_active_backend_is_refused(tmp_path: Path) -> None:
    (tmp_path / "state/age/private_key.txt").unlink()

    assert "kms keygen -o" in refusal(tmp_path, "")


def test_every_backend_that_settings_may_name_is_there() -> None:
    for section in SCHEMES.values():
        assert callable(importlib.import_module(section.MODULE).open_key)


# -- keys by URI -------------------------------------------------------------------------------------


def opened(uri: str | None, settings: Settings) -> AgeBackend:
    parts = urlsplit(uri) if uri is not None else None
    return open_key(parts, settings.backend(AgeSection), strict=settings.is_prod)


def test_no_uri_means_the_section_of_settings(tmp_path: Path) -> None:
    backend = opened(None, settings_of(tmp_path))

    assert backend.versions()[-1].version == version_of(OWN.recipient)
    assert backend.data_keys  # in dev


@pytest.mark.parametrize(
    ("options", "current", "native"),
    [
        ("?public={folder}/public_key.txt", OWN, True),
        ("", NEXT, True),
        ("?native=true", NEXT, True),
        ("?native=false", NEXT, False),
    ],
)
def test_a_uri_names_the_files_and_whether_age_files_get_native_stanzas(
    tmp_path: Path, options: str, current: x25519.X25519Identity, native: bool
) -> None:
    write_pair(tmp_path / "a + b", OWN, NEXT, current=OWN)
    folder = f"{tmp_path}/a%20+%20b"
    backend = opened(f"age://{folder}/private_key.txt{options.format(folder=folder)}", settings_of(tmp_path))

    assert backend.versions()[-1].version == version_of(current.recipient)
    assert backend.native is native


@pytest.mark.parametrize(
    "uri",
    [
        "age://host{own}/private_key.txt",
        "age://user@{own}/private_key.txt",
        "age:",
        "age://",
        "age:private_key.txt",
        "age://{own}/private_key.txt?pubic={own}/public_key.txt",
        "age://{own}/private_key.txt?public={own}/public_key.txt&mode=0600",
        "age://{own}/private_key.txt?public={own}/public_key.txt&public=/x",
        "age://{own}/private_key.txt?public=",
        "age://{own}/private_key.txt#2",
        "age://{own}/private_key.txt?native=no",
        "age://{own}/private_key.txt?native=true&native=false",
        "age://{own}/private_key.txt?native=",
    ],
    ids=[
        "host", "user", "empty", "no path", "relative", "misspelt option", "unknown option", "option twice",
        "empty option", "fragment", "native of another word", "native twice", "native empty",
    ],
)  # fmt: skip
def test_a_wrong_uri_is_refused_with_a_right_one(tmp_path: Path, uri: str) -> None:
    with pytest.raises(
        ConfigurationError, match=r"An age key( is age:///path/to/private_key\.txt|: native is)"
    ):
        opened(uri.format(own=tmp_path / "payroll"), settings_of(tmp_path))


def test_in_prod_a_uri_is_held_to_private_files(tmp_path: Path) -> None:
    write_pair(tmp_path, OWN)
    (tmp_path / "private_key.txt").chmod(0o644)
    text = '[kms]\nenvironment = "prod"\nprod_backend = "age"\nallow_age_in_prod = true\n'
    prod = settings_of(tmp_path, text)

    with pytest.raises(ConfigurationError, match="chmod 600"):
        opened(f"age://{tmp_path}/private_key.txt", prod)


# -- shared wrap keys --------------------------------------------------------------------------------

TRANSIT: Final = '[kms.transit]\naddress = "http://127.0.0.1:9"\ntoken = "t"\n[kms.keys]\n'


@pytest.mark.parametrize(
    ("uris", "said"),
    [
        ('"transit:k?share="', "share takes 1s to 60m"),
        ('"transit:k?share=5"', "share takes 1s to 60m"),
        ('"transit:k?share=0s"', "share takes 1s to 60m"),
        ('"transit:k?share=-5m"', "share takes 1s to 60m"),
        ('"transit:k?share=61m"', "share takes 1s to 60m"),
        ('"transit:k?share=999999d"', "share takes 1s to 60m"),
        ('"transit:k?share=for ever"', "share takes 1s to 60m"),
        ('"transit:k?share=5m&share=6m"', "no option is given twice"),
        ('"transit:k?native=false"', "A transit key is transit:<key name>"),
        ('"age://{tmp}/payroll/private_key.txt?share=5m"', "use native=false for an Age key"),
        ('["transit:k", "age://{tmp}/payroll/private_key.txt?share=5m"]', "use native=false for an Age key"),
    ],
)
def test_share_outside_its_bounds_is_refused(tmp_path: Path, uris: str, said: str) -> None:
    refused = refusal(tmp_path, TRANSIT + f"payroll = {uris}".replace("{tmp}", str(tmp_path)))

    assert refused.startswith("kms.keys.payroll: ") or "transit key is" in refused
    assert said in refused


@pytest.mark.parametrize("share", ["1s", "90s", "5m", "60m", "1h"])
def test_a_key_on_a_server_may_share_wrap_keys(tmp_path: Path, share: str) -> None:
    keys = built(tmp_path, TRANSIT + f'payroll = "transit:k?share={share}&mount=m"\nalone = "transit:k"')
    shared = keys.named("payroll").backend

    assert isinstance(shared, SharingBackend)
    assert shared.for_job() is shared
    assert isinstance(keys.named("alone").backend, RemoteBackend)


def ready_ring(tmp_path: Path) -> tuple[Keyring, bytes, bytes]:
    """A keyring with a shared remote key whose wrap keys are at hand, a file of it, and one of an Age key."""
    cipher = MemoryCipher()
    shared = SharingBackend(RemoteBackend(cipher, policy=NO_RETRIES), WrapKeys(), 300.0)
    age = age_backend(tmp_path, OWN)
    kms = kms_over(shared, {"local": age, "far": memory_backend()[0]})
    file = kms.encrypt(ADA, b"salary", ROW_7).ciphertext
    kms.decrypt(ADA, file, ROW_7)
    return kms.keyring, file, kms.encrypt(ADA, b"salary", ROW_7, key_id="local").ciphertext


def test_a_call_is_ready_only_if_it_certainly_needs_no_server(tmp_path: Path) -> None:
    keys, file, local = ready_ring(tmp_path)

    assert keys.is_ready("acme", None, file, seals=False)
    assert keys.is_ready("acme", None, file, seals=True)
    assert keys.is_ready("acme", "local", file, seals=True)
    assert keys.is_ready("acme", None, b"", seals=True)
    assert keys.is_ready("acme", "local", b"", seals=True)
    for asked in (("rival", None, file), ("acme", None, b""), ("acme", None, local), ("acme", None, b"x")):
        assert not keys.is_ready(*asked, seals=False)
    assert not keys.is_ready("acme", "far", b"", seals=True)
    assert not keys.is_ready("acme", "far", file, seals=True)
    assert not keys.is_ready("acme", "nobody", b"", seals=True)


def test_no_other_header_passes_for_one_that_needs_no_server(tmp_path: Path) -> None:
    """The event loop runs such calls: a header with a second wrap, or of another shape, could stop it."""
    keys, file, _ = ready_ring(tmp_path)
    head = header.parse(file, header.FILE_LIMITS)
    wrap, bound = head.stanzas
    more = binding.wrap_stanza(KeyRef("acme", "far", "1", "memory"), bytes(60))
    other = header.Stanza((*bound.args[:2], "far", *bound.args[3:]), bound.body)
    unshared = header.Stanza(wrap.args[:4], wrap.body)
    for stanzas in (
        [more, wrap, bound], [wrap, more, bound], [wrap, bound, more], [wrap, other], [unshared, bound],
        [header.bundle([wrap, bound])], [header.Stanza(("x", "y"), b""), wrap, bound],
    ):  # fmt: skip
        made = header.render(stanzas, bytes(16)) + bytes(16)
        assert not keys.is_ready("acme", None, made, seals=False)
    assert not keys.is_ready("acme", None, b"\n" + file, seals=False)
    assert keys.is_ready("acme", None, header.render([wrap, bound], bytes(16)), seals=False)


# -- for whom a call waits ---------------------------------------------------------------------------


def test_a_bundle_names_the_backend_that_a_call_waits_for_as_its_stanzas_do(tmp_path: Path) -> None:
    """Else calls on a silent backend would take the threads of all others."""
    keys = built(tmp_path, TRANSIT + 'remote = "transit:k"')
    ref = KeyRef("default", "remote", "1", "transit")
    stanzas = [
        binding.context_stanza(bytes(16), ref, Context.parse("row=7")),
        binding.wrap_stanza(ref, bytes(200)),
    ]
    texts = [
        b"".join(map(header.render_stanza, stanzas)),
        header.render_stanza(header.bundle(stanzas)),
        header.render(
            [header.Stanza(("X25519", "a"), bytes(32)), header.bundle(reversed(stanzas))], bytes(16)
        ),
    ]

    assert [keys.waits_on([], [text]) for text in texts] == ["transit"] * 3
    assert keys.waits_on([], [b"-> kms-service/bundle 1\n" + b"A" * 63]) is None
    assert keys.waits_on([None, "remote"]) == "transit"
    assert keys.waits_on([None]) is None


def test_a_file_of_a_local_key_waits_for_no_default_key_on_a_server(tmp_path: Path) -> None:
    keys = built(
        tmp_path,
        '[kms]\ndefault_key_id = "remote"\n' + TRANSIT + 'remote = "transit:k"\n'
        'local = "age://{tmp}/payroll/private_key.txt"',
    )
    bound = binding.context_stanza(bytes(16), KeyRef("default", "local", "1", "age"), Context.parse("row=7"))

    assert keys.waits_on([], [header.render_stanza(bound)]) is None
    assert keys.waits_on([], [b"of another program"]) == keys.waits_on([None]) == "transit"
