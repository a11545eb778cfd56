"""``kms migrate transit`` and ``aws``: from real servers into a real service."""

import base64
import json
from pathlib import Path
from urllib.parse import urlsplit

import pytest

from support.aws_servers import ACCESS_KEY, REGION, SECRET_KEY, AwsServer, moto
from support.cli.fixtures import Place
from support.cli.migrate import Ran, Workspace, b64, report
from support.openbao import ROOT_TOKEN, Bao, bao
from support.service import Service
from support.tcp_proxy import TcpProxy

CONTEXT = "env=prod"
AWS = {"AWS_ACCESS_KEY_ID": ACCESS_KEY, "AWS_SECRET_ACCESS_KEY": SECRET_KEY}


@pytest.fixture
def workspace(tmp_path: Path, real_service: Place) -> Workspace:
    token = tmp_path / "vault-token"
    token.write_text(ROOT_TOKEN)
    token.chmod(0o600)
    return Workspace(tmp_path, real_service)


@pytest.fixture(scope="module")
def vault() -> Bao:
    return bao()


@pytest.fixture(scope="module")
def aws() -> AwsServer:
    return moto()


def in_transit(vault: Bao, key: str, plaintext: bytes, **more: str) -> str:
    """A ciphertext of transit."""
    asked = {"plaintext": b64(plaintext), **more}
    made: str = vault.admin("POST", f"transit/encrypt/{key}", asked)["data"]["ciphertext"]
    return made


def in_aws(aws: AwsServer, key: str, plaintext: bytes, **context: str) -> str:
    """A CiphertextBlob in base64."""
    return b64(aws.admin.encrypt(KeyId=key, Plaintext=plaintext, EncryptionContext=context)["CiphertextBlob"])


def from_vault(workspace: Workspace, url: str, *words: str, given: bytes = b"") -> Ran:
    access = ["--vault-address", url, "--vault-token-file", "vault-token"]
    return workspace.kms("migrate", "transit", *access, "--json", *words, given=given)


def from_aws(workspace: Workspace, aws: AwsServer, *words: str, given: bytes = b"") -> Ran:
    place = ["--endpoint-url", aws.url, "--region", REGION]
    return workspace.kms("migrate", "aws", *place, "--json", *words, given=given, env=AWS)


# -- transit -----------------------------------------------------------------------------------------


def test_ciphertexts_of_transit_become_ours_with_a_context(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    secrets = [b"", b"one", b"two" * 10_000, bytes(range(256))]
    lines = [in_transit(vault, key, secret) for secret in secrets]
    vault.admin("POST", f"transit/keys/{key}/rotate")
    lines.append(in_transit(vault, key, b"after the rotation"))

    done = from_vault(
        workspace,
        vault.url,
        "--key",
        key,
        "--context",
        CONTEXT,
        "-o",
        "out.ndjson",
        workspace.write("in.txt", lines),
    )

    assert (done.returncode, done.stderr) == (0, b"")
    assert report(done) == {"lines": 5, "moved": 5, "already_there": 0, "failed": 0}
    opened = [workspace.opened(record, CONTEXT) for record in workspace.records("out.ndjson")]
    assert opened == [*secrets, b"after the rotation"]


def test_lines_of_json_bring_what_transit_bound_and_what_we_shall_bind(
    workspace: Workspace, vault: Bao
) -> None:
    plain, derived = vault.new_key(), vault.new_key(derived=True)
    lines = [
        {
            "ciphertext": in_transit(vault, plain, b"with data", associated_data=b64(b"row 7")),
            "associated_data": b64(b"row 7"),
            "reference": "row-7",
            "new_context": {"row": "7"},
        },
        {
            "ciphertext": in_transit(vault, derived, b"derived", context=b64(b"tenant")),
            "key": derived,
            "context": b64(b"tenant"),
            "associated_data": None,
            "new_context": "tenant=acme",
        },
        in_transit(vault, plain, b"bare"),
    ]
    done = from_vault(
        workspace, vault.url, "--key", plain, "-o", "out", "--context", CONTEXT, workspace.write("in", lines)
    )

    assert (done.returncode, done.stderr) == (0, b"")
    first, second, third = workspace.records("out")
    assert first["reference"] == "row-7"
    assert [first["line"], second["line"], third["line"]] == [1, 2, 3]
    assert workspace.opened(first, {"row": "7"}) == b"with data"
    assert workspace.opened(second, "tenant=acme") == b"derived"
    assert workspace.opened(third, CONTEXT) == b"bare"


def test_bad_lines_are_told_and_stop_nothing(workspace: Workspace, vault: Bao) -> None:
    key, other = vault.new_key(), vault.new_key()
    good = in_transit(vault, key, b"good")
    bound = in_transit(vault, key, b"bound", associated_data=b64(b"row 7"))
    lines = [
        good,
        "not a ciphertext",
        in_transit(vault, other, b"of another key"),
        "",
        good[:-8] + "AAAAAAA=",
        "{",
        {"ciphertext": good, "colour": "red"},
        {"ciphertext": good, "key": "nokey"},
        bound,
        b"\xff\xfe",
        {"ciphertext": good, "new_key_id": "no key?"},
        b'{"ciphertext":' + b"[" * 100_000,
        in_transit(vault, key, b"last"),
    ]

    done = from_vault(workspace, vault.url, "--key", key, "-o", "out", workspace.write("in", lines))

    assert done.returncode == 65
    assert report(done) == {"lines": 12, "moved": 2, "already_there": 0, "failed": 10}
    assert [workspace.opened(record) for record in workspace.records("out")] == [b"good", b"last"]
    told = [line.split(b": ")[1] for line in done.stderr.splitlines()]
    assert told == [b"line %d" % number for number in (2, 3, 5, 6, 7, 8, 9, 10, 11, 12)]
    assert good.encode() not in done.stderr


def test_a_second_run_moves_only_what_is_not_there(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    lines = [in_transit(vault, key, b"%d" % number) for number in range(5)]
    first = from_vault(workspace, vault.url, "--key", key, "-o", "out", workspace.write("in", lines[:3]))
    before = (workspace.folder / "out").read_bytes()
    (workspace.folder / "out").write_bytes(
        before[:-20]
    )  # as a crash in the middle of the last line leaves it
    second = from_vault(workspace, vault.url, "--key", key, "-o", "out", workspace.write("in", lines))
    third = from_vault(workspace, vault.url, "--key", key, "-o", "out", "in")

    assert report(first)["moved"] == 3
    assert report(second) == {"lines": 5, "moved": 3, "already_there": 2, "failed": 0}
    assert report(third) == {"lines": 5, "moved": 0, "already_there": 5, "failed": 0}
    assert [workspace.opened(record) for record in workspace.records("out")] == [b"0", b"1", b"2", b"3", b"4"]


def test_a_vault_that_goes_away_ends_the_run_and_the_next_one_goes_on(
    workspace: Workspace, vault: Bao
) -> None:
    key = vault.new_key()
    relay = TcpProxy(urlsplit(vault.url).port or 0)
    lines = [in_transit(vault, key, b"%d" % number) for number in range(3)]
    workspace.write("in", lines)
    assert (
        from_vault(
            workspace, relay.url, "--key", key, "-o", "out", workspace.write("first", lines[:1])
        ).returncode
        == 0
    )
    relay.cut()
    away = from_vault(workspace, relay.url, "--key", key, "-o", "out", "in")
    relay.mend()
    back = from_vault(workspace, relay.url, "--key", key, "-o", "out", "in")

    assert away.returncode == 69
    assert report(away) == {"lines": 2, "moved": 0, "already_there": 1, "failed": 0}
    assert report(back) == {"lines": 3, "moved": 2, "already_there": 1, "failed": 0}


def test_a_token_that_is_refused_is_not_tried_on_every_line(workspace: Workspace, vault: Bao) -> None:
    (workspace.folder / "vault-token").write_text("s.nobody")
    line = in_transit(vault, vault.new_key(), b"x")

    done = from_vault(workspace, vault.url, "--key", "k", "-o", "out", workspace.write("in", [line] * 100))

    assert done.returncode == 69
    assert b"refuses our token" in done.stderr
    assert report(done)["lines"] == 20
    assert not workspace.records("out")


def test_lines_before_the_end_of_a_run_are_kept(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    first, last = in_transit(vault, key, b"first"), in_transit(vault, key, b"last")
    lines = [first, *[{"ciphertext": first, "key": "nokey", "reference": f"{n}"} for n in range(20)], last]

    done = from_vault(workspace, vault.url, "--key", key, "-o", "out", workspace.write("in", lines))

    assert done.returncode == 69
    assert report(done) == {"lines": 21, "moved": 1, "already_there": 0, "failed": 19}
    assert [workspace.opened(record) for record in workspace.records("out")] == [b"first"]


def test_a_service_that_is_away_ends_the_run(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    given = workspace.write("in", [in_transit(vault, key, b"x")])

    done = from_vault(workspace, vault.url, "--key", key, "-o", "out", given, "--url", "http://127.0.0.1:9")

    assert done.returncode == 69
    assert not workspace.records("out")


def test_a_rehearsal_opens_everything_and_writes_nothing(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    given = workspace.write("in", [in_transit(vault, key, b"x"), "vault:v1:AAAA"])

    done = from_vault(workspace, vault.url, "--key", key, "--dry-run", "-o", "out", given)

    assert done.returncode == 65
    assert report(done) == {"lines": 2, "would_move": 1, "already_there": 0, "failed": 1}
    assert not (workspace.folder / "out").exists()


def test_a_pipe_in_the_middle_of_a_pipeline(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    given = b"%s\n%s\n" % (in_transit(vault, key, b"one").encode(), in_transit(vault, key, b"two").encode())

    done = from_vault(workspace, vault.url, "--key", key, given=given)

    assert done.returncode == 0
    assert [workspace.opened(json.loads(line)) for line in done.stdout.splitlines()] == [b"one", b"two"]
    assert b"2 lines, 2 moved" in done.stderr


def test_warnings_do_not_get_among_the_results(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    (workspace.folder / "vault-token").chmod(0o644)

    done = from_vault(workspace, vault.url, "--key", key, given=in_transit(vault, key, b"one").encode())

    assert b"chmod 600" in done.stderr
    assert workspace.opened(json.loads(done.stdout)) == b"one"


def test_a_file_for_each_ciphertext_is_named_by_its_reference(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    (workspace.folder / "out").mkdir()
    lines = [
        {"ciphertext": in_transit(vault, key, b"named"), "reference": "db.password"},
        in_transit(vault, key, b"unnamed"),
        {"ciphertext": in_transit(vault, key, b"evil"), "reference": "../evil"},
        {"ciphertext": in_transit(vault, key, b"another"), "reference": "db.password"},
    ]
    first = from_vault(
        workspace, vault.url, "--key", key, "--output-dir", "out", workspace.write("in", lines)
    )
    again = from_vault(workspace, vault.url, "--key", key, "--output-dir", "out", "in")

    assert (first.returncode, report(first)["moved"], report(first)["failed"]) == (65, 2, 2)
    assert (again.returncode, report(again)["already_there"], report(again)["failed"]) == (65, 2, 2)
    assert {path.name for path in (workspace.folder / "out").iterdir()} == {"db.password.age", "line-2.age"}
    assert (
        workspace.kms("decrypt", given=(workspace.folder / "out/db.password.age").read_bytes()).stdout
        == b"named"
    )


def test_a_service_of_small_requests_gets_small_ones(
    workspace: Workspace, vault: Bao, tmp_path: Path
) -> None:
    key = vault.new_key()
    secrets = [bytes(30_000), b"small", bytes(10_000), bytes(10_000)]
    given = workspace.write("in", [in_transit(vault, key, secret) for secret in secrets])
    with Service(tmp_path / "small") as small:
        small.constants = {"kms_api.json_body.JsonBody.__init__.__defaults__": (30_000,)}
        small.start("api")
        done = from_vault(workspace, vault.url, "--key", key, "-o", "out", given, "--url", small.url)

    assert (done.returncode, report(done)["moved"], report(done)["failed"]) == (65, 3, 1)
    assert b"line 1: too_large" in done.stderr


def test_an_answer_of_vault_above_the_limit_is_one_bad_line(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    lines = [in_transit(vault, key, bytes(1024 * 1024)), in_transit(vault, key, b"small")]

    done = from_vault(workspace, vault.url, "--key", key, "-o", "out", workspace.write("in", lines))

    assert (done.returncode, report(done)["moved"], report(done)["failed"]) == (65, 1, 1)
    assert b"line 1: backend_unavailable" in done.stderr


def test_more_lines_than_a_batch_stay_in_order(workspace: Workspace, vault: Bao) -> None:
    key = vault.new_key()
    batch = {"batch_input": [{"plaintext": b64(b"%d" % number)} for number in range(230)]}
    made = vault.admin("POST", f"transit/encrypt/{key}", batch)["data"]["batch_results"]

    done = from_vault(
        workspace,
        vault.url,
        "--key",
        key,
        "-o",
        "out",
        workspace.write("in", [item["ciphertext"] for item in made]),
    )

    assert report(done)["moved"] == 230
    records = workspace.records("out")
    assert [record["line"] for record in records] == list(range(1, 231))
    assert [workspace.opened(records[at]) for at in (0, 99, 100, 229)] == [b"0", b"99", b"100", b"229"]


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["--vault-address", "ftp://vault", "--vault-token-file", "vault-token"], 78),
        (["--vault-address", "https://vault", "--vault-token-file", "no-such-file"], 78),
        (["--vault-address", "https://vault", "--vault-token-file", "vault-token", "--context", "x"], 65),
        (
            ["--vault-address", "https://vault", "--vault-token-file", "vault-token", "--vault-context", "%"],
            2,
        ),
        (["--vault-token-file", "vault-token"], 2),
        (
            [
                "--vault-address",
                "https://v",
                "--vault-token-file",
                "vault-token",
                "-o",
                "o",
                "--output-dir",
                ".",
            ],
            2,
        ),
    ],
    ids=["address", "token", "context", "not base64", "no address", "two outputs"],
)
def test_a_command_that_cannot_work_ends_before_it_begins(
    workspace: Workspace, words: list[str], code: int
) -> None:
    done = workspace.kms("migrate", "transit", *words)

    assert done.returncode == code
    assert not (workspace.folder / "o").exists()


@pytest.mark.parametrize("notes", ["precious notes\n", "precious notes", '{"precious": "notes"}'])
def test_an_output_of_something_else_is_left_alone(workspace: Workspace, vault: Bao, notes: str) -> None:
    (workspace.folder / "out").write_text(notes)

    done = from_vault(workspace, vault.url, "--key", "k", "-o", "out", given=b"vault:v1:AAAA")

    assert done.returncode == 65
    assert (workspace.folder / "out").read_text() == notes


# -- AWS KMS -----------------------------------------------------------------------------------------


def test_ciphertexts_of_aws_become_ours_and_keep_their_context(workspace: Workspace, aws: AwsServer) -> None:
    key = aws.new_key()
    lines = [
        {
            "CiphertextBlob": in_aws(aws, key, b"bound", tenant="acme"),
            "EncryptionContext": {"tenant": "acme"},
        },
        {
            "CiphertextBlob": in_aws(aws, key, b"another", tenant="acme"),
            "EncryptionContext": {"tenant": "acme"},
            "KeyId": key,
            "new_context": "tenant=acme,env=prod",
            "reference": "r",
        },
        in_aws(aws, key, b"bare"),
    ]

    done = from_aws(workspace, aws, "-o", "out", workspace.write("in", lines))

    assert (done.returncode, done.stderr) == (0, b"")
    first, second, third = workspace.records("out")
    assert workspace.opened(first, {"tenant": "acme"}) == b"bound"
    assert workspace.opened(second, {"tenant": "acme", "env": "prod"}) == b"another"
    assert workspace.opened(third) == b"bare"


def test_options_say_what_lines_of_aws_do_not(workspace: Workspace, aws: AwsServer) -> None:
    key = aws.new_key()
    given = in_aws(aws, key, b"bound", tenant="acme").encode()

    done = from_aws(
        workspace,
        aws,
        "--aws-key",
        key,
        "--encryption-context",
        "tenant=acme",
        "--context",
        CONTEXT,
        given=given,
    )

    assert done.returncode == 0
    assert workspace.opened(json.loads(done.stdout), CONTEXT) == b"bound"


def test_bad_lines_of_aws_are_told_and_stop_nothing(workspace: Workspace, aws: AwsServer) -> None:
    key, other = aws.new_key(), aws.new_key()
    good = in_aws(aws, key, b"good")
    *start, last = base64.b64decode(good)
    tampered = bytes([*start, last ^ 1])
    lines = [
        {
            "CiphertextBlob": in_aws(aws, key, b"bound", tenant="acme"),
            "EncryptionContext": {"tenant": "evil"},
        },
        b64(tampered),
        in_aws(aws, other, b"of another key"),
        "%%%",
        {"CiphertextBlob": good, "KeyId": "alias/nobody"},
        good,
    ]

    done = from_aws(workspace, aws, "--aws-key", key, "-o", "out", workspace.write("in", lines))

    assert done.returncode == 65
    assert report(done) == {"lines": 6, "moved": 1, "already_there": 0, "failed": 5}
    assert [workspace.opened(record) for record in workspace.records("out")] == [b"good"]


def test_an_endpoint_without_tls_is_for_this_machine(workspace: Workspace) -> None:
    done = workspace.kms("migrate", "aws", "--endpoint-url", "http://kms.example.com", "--region", REGION)

    assert done.returncode == 78
    assert b"https://" in done.stderr
