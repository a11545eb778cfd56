"""``kms migrate transit`` and ``aws``: from real servers into a real service, and into one that lies."""

import base64
import json
import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from kms_protocol.wire import PREFIX
from support.aws_servers import ACCESS_KEY, REGION, SECRET_KEY, AwsServer, moto
from support.cli.fixtures import RunningService
from support.cli.migrate import Json, Ran, Workspace, report
from support.openbao import ROOT_TOKEN, Bao, bao
from support.service import Service, b64
from support.tcp_proxy import TcpProxy

CONTEXT = "env=prod"
AWS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}
ACCESS = "--vault-address https://vault --vault-token-file vault-token"


@pytest.fixture
def workspace(tmp_path: Path, real_service: RunningService) -> Workspace:
    token = tmp_path / "vault-token"
    token.write_text(ROOT_TOKEN)
    token.chmod(0o600)
    return Workspace(tmp_path, real_service)


def opened(workspace: Workspace, context: str | None = None) -> list[bytes]:
    """What the service makes of the records in ``out``."""
    return [workspace.opened(record, context) for record in workspace.records("out")]


@dataclass(frozen=True)
class Transit:
    """A key of transit whose ciphertexts are moved from the file ``in`` to the file ``out``."""

    workspace: Workspace
    vault: Bao
    key: str

    def sealed(self, plaintext: bytes, key: str = "", **more: str) -> str:
        asked = {"plaintext": b64(plaintext), **more}
        answer = self.vault.admin("POST", f"transit/encrypt/{key or self.key}", asked)
        return str(answer["data"]["ciphertext"])

    def kms(self, *words: str, url: str = "", given: bytes = b"") -> Ran:
        access = ["--vault-address", url or self.vault.url, "--vault-token-file", "vault-token"]
        access += ["--key", self.key]
        return self.workspace.kms("migrate", "transit", *access, "--json", *words, given=given)

    def moved(self, lines: Iterable[object], *words: str, url: str = "") -> Ran:
        return self.kms("-o", "out", *words, self.workspace.write("in", lines), url=url)


@pytest.fixture
def transit(workspace: Workspace) -> Transit:
    return Transit(workspace, bao(), bao().new_key())


# -- transit -----------------------------------------------------------------------------------------


def test_ciphertexts_of_transit_become_ours_with_a_context(transit: Transit) -> None:
    secrets = [b"", b"one", b"two" * 10_000, bytes(range(256))]
    lines = [transit.sealed(secret) for secret in secrets]
    transit.vault.admin("POST", f"transit/keys/{transit.key}/rotate")
    done = transit.moved([*lines, transit.sealed(b"after the rotation")], "--context", CONTEXT)

    assert (done.returncode, done.stderr) == (0, b"")
    assert report(done) == {"lines": 5, "moved": 5, "already_there": 0, "failed": 0}
    assert opened(transit.workspace, CONTEXT) == [*secrets, b"after the rotation"]


def test_lines_of_json_bring_what_transit_bound_and_what_we_shall_bind(transit: Transit) -> None:
    derived = transit.vault.new_key(derived=True)
    data, tenant = b64(b"row 7"), b64(b"tenant")
    with_data = {"ciphertext": transit.sealed(b"with data", associated_data=data), "associated_data": data}
    of_another = {"ciphertext": transit.sealed(b"derived", derived, context=tenant), "context": tenant}
    lines = [
        with_data | {"reference": "row-7", "new_context": {"row": "7"}},
        of_another | {"key": derived, "associated_data": None, "new_context": "tenant=acme"},
        transit.sealed(b"bare"),
    ]
    done = transit.moved(lines, "--context", CONTEXT)

    assert (done.returncode, done.stderr) == (0, b"")
    records = transit.workspace.records("out")
    assert records[0]["reference"] == "row-7"
    assert [record["line"] for record in records] == [1, 2, 3]
    contexts: list[str | dict[str, str]] = [{"row": "7"}, "tenant=acme", CONTEXT]
    found = [transit.workspace.opened(*each) for each in zip(records, contexts, strict=True)]
    assert found == [b"with data", b"derived", b"bare"]


def test_bad_lines_are_told_and_stop_nothing(transit: Transit) -> None:
    good = transit.sealed(b"good")
    lines = [
        good,
        "not a ciphertext",
        transit.sealed(b"of another key", transit.vault.new_key()),
        "",
        good[:-8] + "AAAAAAA=",
        "{",
        {"ciphertext": good, "colour": "red"},
        {"ciphertext": good, "key": "nokey"},
        transit.sealed(b"bound", associated_data=b64(b"row 7")),
        b"\xff\xfe",
        {"ciphertext": good, "new_key_id": "no key?"},
        b'{"ciphertext":' + b"[" * 100_000,
        transit.sealed(b"last"),
    ]
    done = transit.moved(lines)

    assert done.returncode == 65
    assert report(done) == {"lines": 12, "moved": 2, "already_there": 0, "failed": 10}
    assert opened(transit.workspace) == [b"good", b"last"]
    told = [line.split(b": ")[1] for line in done.stderr.splitlines()]
    assert told == [b"line %d" % number for number in (2, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    assert good.encode() not in done.stderr


def test_a_second_run_moves_only_what_is_not_there(transit: Transit) -> None:
    lines = [transit.sealed(b"%d" % number) for number in range(5)]
    first = transit.moved(lines[:3])
    out = transit.workspace.folder / "out"
    out.write_bytes(out.read_bytes()[:-20])  # as a crash in the middle of the last line leaves it
    second, third = transit.moved(lines), transit.moved(lines)

    assert report(first)["moved"] == 3
    assert report(second) == {"lines": 5, "moved": 3, "already_there": 2, "failed": 0}
    assert report(third) == {"lines": 5, "moved": 0, "already_there": 5, "failed": 0}
    assert opened(transit.workspace) == [b"0", b"1", b"2", b"3", b"4"]


def test_a_vault_that_goes_away_ends_the_run_and_the_next_one_goes_on(transit: Transit) -> None:
    relay = TcpProxy(urlsplit(transit.vault.url).port or 0)
    lines = [transit.sealed(b"%d" % number) for number in range(3)]
    assert transit.moved(lines[:1], url=relay.url).returncode == 0
    relay.cut()
    away = transit.moved(lines, url=relay.url)
    relay.mend()
    back = transit.moved(lines, url=relay.url)

    assert away.returncode == 69
    assert report(away) == {"lines": 2, "moved": 0, "already_there": 1, "failed": 0}
    assert report(back) == {"lines": 3, "moved": 2, "already_there": 1, "failed": 0}


def test_a_token_that_is_refused_is_not_tried_on_every_line(transit: Transit) -> None:
    (transit.workspace.folder / "vault-token").write_text("s.nobody")
    done = transit.moved([transit.sealed(b"x")] * 100)

    assert done.returncode == 69
    assert b"refuses our token" in done.stderr
    assert report(done)["lines"] == 20
    assert not transit.workspace.records("out")


def test_lines_before_the_end_of_a_run_are_kept(transit: Transit) -> None:
    first = transit.sealed(b"first")
    failing = [{"ciphertext": first, "key": "nokey", "reference": f"{n}"} for n in range(20)]
    done = transit.moved([first, *failing, transit.sealed(b"last")])

    assert done.returncode == 69
    assert report(done) == {"lines": 21, "moved": 1, "already_there": 0, "failed": 19}
    assert opened(transit.workspace) == [b"first"]


def test_a_service_that_is_away_ends_the_run(transit: Transit) -> None:
    assert transit.moved([transit.sealed(b"x")], "--url", "http://127.0.0.1:9").returncode == 69
    assert not transit.workspace.records("out")


def test_a_rehearsal_opens_everything_and_writes_nothing(transit: Transit) -> None:
    done = transit.moved([transit.sealed(b"x"), "vault:v1:AAAA"], "--dry-run")

    assert done.returncode == 65
    assert report(done) == {"lines": 2, "would_move": 1, "already_there": 0, "failed": 1}
    assert not (transit.workspace.folder / "out").exists()


def test_a_pipe_in_the_middle_of_a_pipeline_gets_results_and_no_warning(transit: Transit) -> None:
    (transit.workspace.folder / "vault-token").chmod(0o644)
    done = transit.kms(given=f"{transit.sealed(b'one')}\n{transit.sealed(b'two')}\n".encode())

    assert done.returncode == 0
    records = map(json.loads, done.stdout.splitlines())
    assert [transit.workspace.opened(record) for record in records] == [b"one", b"two"]
    assert b"chmod 600" in done.stderr
    assert b"2 lines, 2 moved" in done.stderr


def test_a_file_for_each_ciphertext_is_named_by_its_reference(transit: Transit) -> None:
    workspace, out = transit.workspace, transit.workspace.folder / "out"
    out.mkdir()
    lines = [
        {"ciphertext": transit.sealed(b"named"), "reference": "db.password"},
        transit.sealed(b"unnamed"),
        {"ciphertext": transit.sealed(b"evil"), "reference": "../evil"},
        {"ciphertext": transit.sealed(b"another"), "reference": "db.password"},
    ]
    for count in ("moved", "already_there"):
        done = transit.kms("--output-dir", "out", workspace.write("in", lines))

        assert (done.returncode, report(done)[count], report(done)["failed"]) == (65, 2, 2)
    assert {path.name for path in out.iterdir()} == {"db.password.age", "line-2.age"}
    assert workspace.kms("decrypt", given=(out / "db.password.age").read_bytes()).stdout == b"named"


def test_a_service_of_small_requests_gets_small_ones(transit: Transit, tmp_path: Path) -> None:
    lines = [transit.sealed(secret) for secret in (bytes(30_000), b"small", bytes(10_000), bytes(10_000))]
    with Service(tmp_path / "small") as small:
        small.constants = {"kms_api.json_body.JsonBody.__init__.__defaults__": (30_000,)}
        small.start("api")
        done = transit.moved(lines, "--url", small.url)

    assert (done.returncode, report(done)["moved"], report(done)["failed"]) == (65, 3, 1)
    assert b"line 1: too_large" in done.stderr


def test_an_answer_of_vault_above_the_limit_is_one_bad_line(transit: Transit) -> None:
    done = transit.moved([transit.sealed(bytes(1024 * 1024)), transit.sealed(b"small")])

    assert (done.returncode, report(done)["moved"], report(done)["failed"]) == (65, 1, 1)
    assert b"line 1: backend_unavailable" in done.stderr


def test_more_lines_than_a_batch_stay_in_order(transit: Transit) -> None:
    batch = {"batch_input": [{"plaintext": b64(b"%d" % number)} for number in range(230)]}
    made = transit.vault.admin("POST", f"transit/encrypt/{transit.key}", batch)["data"]["batch_results"]

    assert report(transit.moved([item["ciphertext"] for item in made]))["moved"] == 230
    records = transit.workspace.records("out")
    assert [record["line"] for record in records] == list(range(1, 231))
    sample = [transit.workspace.opened(records[at]) for at in (0, 99, 100, 229)]
    assert sample == [b"0", b"99", b"100", b"229"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        ("--vault-address ftp://vault --vault-token-file vault-token", 78),
        ("--vault-address https://vault --vault-token-file no-such-file", 78),
        (f"{ACCESS} --context x", 65),
        (f"{ACCESS} --vault-context %", 2),
        ("--vault-token-file vault-token", 2),
        (f"{ACCESS} -o o --output-dir .", 2),
    ],
    ids=["address", "token", "context", "not base64", "no address", "two outputs"],
)
def test_a_command_that_cannot_work_ends_before_it_begins(
    workspace: Workspace, words: str, code: int
) -> None:
    assert workspace.kms("migrate", "transit", *words.split()).returncode == code
    assert not (workspace.folder / "o").exists()


@pytest.mark.parametrize("notes", ["precious notes\n", "precious notes", '{"precious": "notes"}'])
def test_an_output_of_something_else_is_left_alone(transit: Transit, notes: str) -> None:
    (transit.workspace.folder / "out").write_text(notes)

    assert transit.moved(["vault:v1:AAAA"]).returncode == 65
    assert (transit.workspace.folder / "out").read_text() == notes


@pytest.mark.parametrize(
    "make", [os.mkfifo, lambda path: path.symlink_to("/dev/zero")], ids=["pipe", "device"]
)
def test_an_output_that_is_no_file_is_refused_at_once(
    transit: Transit, make: Callable[[Path], object]
) -> None:
    make(transit.workspace.folder / "out")

    assert transit.moved(["vault:v1:AAAA"]).returncode == 65


# -- a service that lies or gives up in the middle: what is not proven is not kept -----------------------


Answer = Callable[[str, bytes], Json]
"""What comes of an operation on one plaintext."""
Migrate = Callable[[Answer], Ran]


def honest(operation: str, plaintext: bytes) -> Json:
    if operation == "encrypt":
        key = {"key_id": "k", "key_version": "1", "backend": "age"}
        return {"ciphertext": b64(plaintext[::-1] + b"!"), **key}
    return {"plaintext": b64(plaintext)}


def batch(answer: Answer, body: Json) -> Json:
    """Answer as a service that seals by writing backwards."""
    results = []
    for index, item in enumerate(body["items"]):
        given = base64.b64decode(item.get("plaintext") or item["ciphertext"])
        plaintext = given if item.get("plaintext") else given[:-1][::-1]
        results.append({"index": index, **answer(body["operation"], plaintext)})
    return {"results": results, "failed": sum("error" in each for each in results)}


@pytest.fixture
def migrated(transit: Transit, stub_service: Callable[[Callable[[str, Json], Json]], str]) -> Migrate:
    """Move three secrets to a service that answers so."""
    lines = [transit.sealed(secret) for secret in (b"first", b"second", b"third")]

    def migrate(answer: Answer) -> Ran:
        def served(path: str, body: Json) -> Json:
            assert path == f"{PREFIX}/batch"
            return batch(answer, body)

        return transit.moved(lines, "--url", stub_service(served))

    return migrate


def kept(workspace: Workspace) -> list[bytes]:
    return [base64.b64decode(record["ciphertext"])[:-1][::-1] for record in workspace.records("out")]


def test_an_honest_service_keeps_all(workspace: Workspace, migrated: Migrate) -> None:
    done = migrated(honest)

    assert (done.returncode, done.stderr) == (0, b"")
    assert kept(workspace) == [b"first", b"second", b"third"]


def lying(operation: str, plaintext: bytes) -> Json:
    return honest(operation, b"sth else" if (operation, plaintext) == ("decrypt", b"second") else plaintext)


def refusing(operation: str, code: str = "forbidden", *secrets: bytes) -> Answer:
    """Refuses this operation on some secrets, by default the second."""

    def answer(asked: str, plaintext: bytes) -> Json:
        is_refused = asked == operation and plaintext in (secrets or [b"second"])
        return {"error": {"code": code}} if is_refused else honest(asked, plaintext)

    return answer


@pytest.mark.parametrize(
    ("answer", "told"),
    [(lying, "not_verified"), (refusing("encrypt"), "forbidden"), (refusing("decrypt"), "forbidden")],
    ids=["opens to something else", "not encrypted", "not decrypted"],
)
def test_what_is_not_proven_is_told_and_not_kept(
    workspace: Workspace, migrated: Migrate, answer: Answer, told: str
) -> None:
    done = migrated(answer)

    assert done.returncode == 65
    assert f"line 2: {told}" in done.stderr.decode()
    assert kept(workspace) == [b"first", b"third"]


@pytest.mark.parametrize("operation", ["encrypt", "decrypt"])
def test_a_backend_that_goes_away_is_no_fault_of_the_line(
    workspace: Workspace, migrated: Migrate, operation: str
) -> None:
    done = migrated(refusing(operation, "backend_unavailable", b"second", b"third"))

    assert done.returncode == 69
    assert report(done) == {"lines": 3, "moved": 1, "already_there": 0, "failed": 0}
    assert kept(workspace) == [b"first"]


# -- AWS KMS -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def aws() -> AwsServer:
    return moto()


def in_aws(aws: AwsServer, key: str, plaintext: bytes, **context: str) -> str:
    """A CiphertextBlob in base64."""
    return b64(aws.admin.encrypt(KeyId=key, Plaintext=plaintext, EncryptionContext=context)["CiphertextBlob"])


def from_aws(workspace: Workspace, aws: AwsServer, *words: str, given: bytes = b"") -> Ran:
    place = ["--endpoint-url", aws.url, "--region", REGION]
    return workspace.kms("migrate", "aws", *place, "--json", *words, given=given, env=AWS)


def test_ciphertexts_of_aws_become_ours_and_keep_their_context(workspace: Workspace, aws: AwsServer) -> None:
    key, bound = aws.new_key(), {"tenant": "acme"}
    moved = {"KeyId": key, "new_context": "tenant=acme,env=prod", "reference": "r"}
    lines = [
        {"CiphertextBlob": in_aws(aws, key, b"bound", **bound), "EncryptionContext": bound},
        {"CiphertextBlob": in_aws(aws, key, b"another", **bound), "EncryptionContext": bound, **moved},
        in_aws(aws, key, b"bare"),
    ]
    done = from_aws(workspace, aws, "-o", "out", workspace.write("in", lines))

    assert (done.returncode, done.stderr) == (0, b"")
    first, second, third = workspace.records("out")
    assert workspace.opened(first, bound) == b"bound"
    assert workspace.opened(second, {"tenant": "acme", "env": "prod"}) == b"another"
    assert workspace.opened(third) == b"bare"


def test_options_say_what_lines_of_aws_do_not(workspace: Workspace, aws: AwsServer) -> None:
    key = aws.new_key()
    options = ["--aws-key", key, "--encryption-context", "tenant=acme", "--context", CONTEXT]
    done = from_aws(workspace, aws, *options, given=in_aws(aws, key, b"bound", tenant="acme").encode())

    assert done.returncode == 0
    assert workspace.opened(json.loads(done.stdout), CONTEXT) == b"bound"


def test_bad_lines_of_aws_are_told_and_stop_nothing(workspace: Workspace, aws: AwsServer) -> None:
    key, other = aws.new_key(), aws.new_key()
    good = in_aws(aws, key, b"good")
    *start, last = base64.b64decode(good)
    bound = in_aws(aws, key, b"bound", tenant="acme")
    lines = [
        {"CiphertextBlob": bound, "EncryptionContext": {"tenant": "evil"}},
        b64(bytes([*start, last ^ 1])),
        in_aws(aws, other, b"of another key"),
        "%%%",
        {"CiphertextBlob": good, "KeyId": "alias/nobody"},
        good,
    ]
    done = from_aws(workspace, aws, "--aws-key", key, "-o", "out", workspace.write("in", lines))

    assert done.returncode == 65
    assert report(done) == {"lines": 6, "moved": 1, "already_there": 0, "failed": 5}
    assert opened(workspace) == [b"good"]


def test_an_endpoint_without_tls_is_for_this_machine(workspace: Workspace) -> None:
    done = workspace.kms("migrate", "aws", "--endpoint-url", "http://kms.example.com", "--region", REGION)

    assert done.returncode == 78
    assert b"https://" in done.stderr
