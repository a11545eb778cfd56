"""The Nushell module, run by Nushell itself, two versions, against a real service."""

import json
import os
import re
import socket
import stat
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final

import pytest
from cryptography import x509

from support import pages
from support.cli.fixtures import BIN
from support.credentials import REQUIRED, Authority, SecuredService
from support.http_servers import QuietHandler, served
from support.job_stores import forge
from support.nushell import MODULE, ROOT, TIMEOUT_S, Nu, fetched, unframed
from support.ports import free_port
from support.scripted_servers import scripted
from support.service import CANARY, Service, b64, core_of, unb64

EXAMPLES: Final = pages.blocks_to_run("docs/nushell.md", "nu")
VERSIONS: Final = ["0.108.0", "0.115.1"]
MIB: Final = 1024 * 1024


@pytest.fixture(scope="session", params=VERSIONS)
def program(request: pytest.FixtureRequest) -> Path:
    return fetched(request.param)


@pytest.fixture(scope="module")
def secured(tmp_path_factory: pytest.TempPathFactory, module_redis: str) -> Iterator[SecuredService]:
    settings = f"[kms.age]\ndata_keys = true\n{REQUIRED}"
    with SecuredService(tmp_path_factory.mktemp("secured"), settings, module_redis) as running:
        yield running.start()


@pytest.fixture(scope="module")
def token_file(secured: SecuredService, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("token") / "token"
    path.write_text(secured.new_token("*")[1] + "\n")
    return path


@pytest.fixture
def bare(program: Path, tmp_path: Path) -> Nu:
    """Told of no service."""
    return Nu(program, tmp_path, {})


@pytest.fixture
def nu(program: Path, secured: SecuredService, token_file: Path, tmp_path: Path) -> Nu:
    return Nu(program, tmp_path, {"KMS_SERVICE_URL": secured.url, "KMS_TOKEN_FILE": str(token_file)})


@pytest.fixture
def waiting(program: Path, no_worker: Service, tmp_path: Path) -> Nu:
    """Its service has no worker."""
    return Nu(program, tmp_path, {"KMS_SERVICE_URL": no_worker.url})


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


# -- the module itself -------------------------------------------------------------------------------


def test_nu_finds_nothing_wrong_with_the_module(bare: Nu) -> None:
    names = sorted(MODULE.glob("*.nu"))
    checks = ", ".join(f"(nu-check --as-module '{name}')" for name in names)

    assert bare.gives(f"[{checks}]") == [True] * len(names)
    assert bare.gives(f"nu-check '{MODULE}/mod.nu'") is True
    command = [str(bare.program), "--no-config-file", "--ide-check", "20", str(MODULE / "mod.nu")]
    assert '"diagnostic"' not in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def test_commands_explain_themselves(bare: Nu) -> None:
    names = bare.gives("scope commands | where name =~ '^kms ' | get name | sort")

    assert {"kms encrypt", "kms generate-key", "kms decrypt-file", "kms job wait", "kms rewrap"} <= set(names)
    listed = "scope commands | where name =~ '^kms '"
    assert bare.gives(f"{listed} | where ($it.examples | is-empty) or category != kms | get name") == []
    described = "$it.signatures | values | flatten | where parameter_name != null and description == ''"
    assert bare.gives(f"{listed} | where ({described} | is-not-empty) | get name") == []


def test_it_is_an_overlay_too(nu: Nu) -> None:
    assert nu.gives("overlay use nu/kms --prefix as ours\nkms health | get status") == "healthy"


SEED: Final = """
use provisioning/core/nulib/kms

# Set service URL
$env.KMS_SERVICE_URL = $env.ADDRESS

# Encrypt data
"secret-data" | kms encrypt
"api-key" | kms encrypt --context "env=prod,service=api"

# Decrypt data
let ciphertext = "api-key" | kms encrypt
$ciphertext | kms decrypt
let ciphertext = "api-key" | kms encrypt --context "env=prod,service=api"
$ciphertext | kms decrypt --context "env=prod,service=api"

# Generate data key (Cosmian only)
kms generate-key
kms generate-key --key-spec AES_128

# Check service status
kms status
kms health

# Encrypt/decrypt files
kms encrypt-file config.yaml
kms encrypt-file secrets.json --output secrets.enc --context "env=prod"
rm config.yaml secrets.json

kms decrypt-file config.yaml.enc
kms decrypt-file secrets.enc --output secrets.json --context "env=prod"
kms encrypt-file workspace/config/secrets.yaml
kms encrypt-file temp_key --context "infra=prod,purpose=deployment"
"""


def test_the_commands_of_the_first_document_run_as_they_are(nu: Nu, secured: SecuredService) -> None:
    library = nu.folder / "provisioning" / "core" / "nulib"
    library.mkdir(parents=True)
    (library / "kms").symlink_to(MODULE)
    (nu.folder / "workspace" / "config").mkdir(parents=True)
    for name in ("config.yaml", "secrets.json", "temp_key", "workspace/config/secrets.yaml"):
        nu.file(name, name)

    ran = nu.run(SEED, KMS_SERVICE_URL="http://127.0.0.1:1", ADDRESS=secured.url)

    assert ran.returncode == 0, ran.stderr
    assert "there is no config.yaml.enc, so this decrypts config.yaml.age" in ran.stderr
    assert (nu.folder / "config.yaml").read_text() == "config.yaml"
    assert (nu.folder / "secrets.json").read_text() == "secrets.json"
    sealed = (nu.folder / "temp_key.age").read_bytes()
    body = {"ciphertext": b64(sealed), "context": "purpose=deployment,infra=prod"}
    answer = secured.post("/decrypt", body, headers=secured.token_header("*"))
    assert answer.json()["plaintext"] == b64(b"temp_key")


def test_the_examples_of_the_document_run_as_they_are(nu: Nu) -> None:
    assert len(EXAMPLES) > 7

    ran = nu.run("\n".join(EXAMPLES))

    assert ran.returncode == 0, ran.stderr
    assert "deprecated" not in ran.stderr, ran.stderr


# -- one secret at a time ----------------------------------------------------------------------------


ROUND: Final[dict[str, object]] = {  # what goes in, and what comes out
    '"secret"': "secret",
    '"two\\nlines\\n"': "two\nlines\n",
    '"Grüße 🔑"': "Grüße 🔑",
    '""': "",
    "0x[66 6f 6f]": "foo",
    "0x[ff 00 0a]": [0xFF, 0, 0x0A],
    "0x[ef bb bf 61]": [0xEF, 0xBB, 0xBF, 0x61],
    "0x[e2 82]": [0xE2, 0x82],
    "^printf 'line\\n'": "line\n",
    "^printf '\\377\\n'": [0xFF, 0x0A],
}


def test_what_goes_in_comes_out(nu: Nu) -> None:
    each = " ".join(f"({given} | kms encrypt | kms decrypt)" for given in ROUND)

    assert nu.gives(f"[{each}]") == list(ROUND.values())


def test_raw_gives_bytes_and_full_gives_all(nu: Nu) -> None:
    assert nu.gives("'foo' | kms encrypt | kms decrypt --raw") == [0x66, 0x6F, 0x6F]
    sealed = nu.gives("'foo' | kms encrypt --full")
    assert sealed.keys() == {"ciphertext", "key_id", "key_version", "backend", "file_id"}
    opened = nu.gives(f"'{sealed['ciphertext']}' | kms decrypt --full")
    assert (opened["plaintext"], opened["origin"], opened["key_id"]) == ("foo", "service", "default")


CONTEXTS: Final = [  # what seals, and what opens it
    ('"env=prod,service=api"', "{service: api, env: prod}"),
    ("{row: 7, hot: true}", '"row=7,hot=true"'),
    ('\'{"owners": "ada, grace"}\'', '{owners: "ada, grace"}'),
    ("{}", '""'),
]


def test_a_context_is_text_or_a_record(nu: Nu) -> None:
    each = " ".join(f"('x' | kms encrypt --context {a} | kms decrypt --context {b})" for a, b in CONTEXTS)

    assert nu.gives(f"[{each}]") == ["x"] * len(CONTEXTS)


def test_a_ciphertext_is_taken_as_an_age_file_and_in_armor(nu: Nu) -> None:
    script = """
        let sealed = 'x' | kms encrypt
        let lines = $sealed | split chars | chunks 64 | each { str join }
        let frame = {|end| $"-----($end) AGE ENCRYPTED FILE-----" }
        let armor = [(do $frame BEGIN) ...$lines (do $frame END) ""] | str join "\\n"
        $armor | save armored.age
        kms decrypt-file armored.age --output opened | ignore
        [($sealed | decode base64 | kms decrypt) ($armor | kms decrypt) (open --raw opened)]"""

    assert nu.gives(script) == ["x", "x", "x"]


def test_rewrap_moves_to_another_context(nu: Nu) -> None:
    script = "'x' | kms encrypt --context {a: 1} | kms rewrap --context {a: 1} --new-context {b: 2}"

    assert nu.gives(f"{script} | kms decrypt --context {{b: 2}}") == "x"
    assert "decrypt_failed" in nu.fails(f"{script} | kms decrypt --context {{a: 1}}")


def test_a_data_key_has_the_size_asked_for(nu: Nu) -> None:
    made = nu.gives("kms generate-key --key-spec AES_128 --context env=prod")

    assert made["key_spec"] == "AES_128"
    opened = f"'{made['ciphertext']}' | kms decrypt --raw --context env=prod"
    assert bytes(nu.gives(opened)) == unb64(made["plaintext"])
    assert nu.gives("kms generate-key | get plaintext | decode base64 | bytes length") == 32
    assert "plaintext" not in nu.gives("kms generate-key --without-plaintext")


def test_inspect_needs_no_service(nu: Nu, bare: Nu) -> None:
    sealed = nu.gives("'four' | kms encrypt --context {a: 1}")
    nu.file("sealed.b64", sealed)

    for script in (f"'{sealed}' | kms inspect", "kms inspect sealed.b64"):
        found = bare.gives(script)
        assert (found["key_id"], found["backend"], found["context"]) == ("default", "age", "bound")
        assert (found["origin"], found["plaintext_bytes"]) == ("claimed", 4)
    assert "not_a_ciphertext" in bare.fails("'hello' | kms inspect")


def test_status_health_and_keys_are_records(nu: Nu) -> None:
    script = (
        "[(kms status) (kms).backend (kms health --fail).status (kms keys).id (kms keys --backend transit)]"
    )

    status, *others = nu.gives(script)

    assert status.keys() >= {"backend", "version", "operations", "degraded"}
    assert others == ["age", "healthy", ["default"], []]


# -- files -------------------------------------------------------------------------------------------


def test_a_small_file_goes_in_one_call(nu: Nu) -> None:
    source = nu.file("config [1]*.yaml", b"\xff a: 1\n")

    sealed = nu.gives('kms encrypt-file "config [1]*.yaml" --context {env: prod}')

    target = nu.folder / "config [1]*.yaml.age"
    assert sealed == {
        "source": str(source),
        "output": str(target),
        "bytes": target.stat().st_size,
        "job_id": None,
    }
    source.unlink()
    nu.gives('kms decrypt-file "config [1]*.yaml.age" --context env=prod')
    assert source.read_bytes() == b"\xff a: 1\n"
    assert (mode(source), mode(target)) == (0o600, 0o600)


def test_the_suffix_of_older_versions_is_taken_off_too(nu: Nu) -> None:
    nu.file("note", "note")
    nu.gives("kms encrypt-file note --output older.enc")

    assert nu.gives("kms decrypt-file older.enc | get output") == str(nu.folder / "older")
    assert "no_output" in nu.fails("kms decrypt-file note")
    for name in (".age", ".enc"):
        nu.file(name, (nu.folder / "older.enc").read_bytes())
        assert "no_output" in nu.fails(f"kms decrypt-file {name}")


def test_an_older_name_that_is_missing_stands_for_the_one_of_age(nu: Nu) -> None:
    nu.file("note", "note")
    script = "kms encrypt-file note; cd ..; kms decrypt-file $'($env.HOME)/note.enc' --force | get source"
    assert nu.gives(script) == str(nu.folder / "note.age")
    nu.file("note.enc", "what is there is taken")
    assert "not_a_ciphertext" in nu.fails("kms decrypt-file note.enc --force")
    assert "no_such_file" in nu.fails("kms decrypt-file absent.enc")
    assert "no_such_file" in nu.fails("kms encrypt-file absent.enc")


def test_a_large_file_streams_through_a_job(nu: Nu) -> None:
    source = nu.file("big.bin", os.urandom(MIB) * 48)
    peak = r"open --raw /proc/self/status | parse --regex 'VmHWM:\s+(?<kib>\d+)' | get 0.kib | into int"

    script = f"""
        let sealed = kms encrypt-file big.bin --context {{a: 1}}
        let opened = kms decrypt-file big.bin.age --output copy.bin --context {{a: 1}}
        {{sealed: $sealed, opened: $opened, peak_kib: ({peak})}}"""
    found = nu.gives(script)

    assert found["sealed"]["job_id"]
    assert found["opened"]["bytes"] == source.stat().st_size
    assert (nu.folder / "copy.bin").read_bytes() == source.read_bytes()
    assert mode(nu.folder / "copy.bin") == 0o600
    assert found["peak_kib"] < 64 * 1024  # without the file in it


def test_a_job_and_a_call_mean_the_same_context(nu: Nu) -> None:
    nu.file("note", "note")
    script = """
        let sealed = kms encrypt-file note --priority high --context {owner: "Zoë, 100%", env: prod}
        let opened = kms decrypt-file note.age --output copy --context {env: prod, owner: "Zoë, 100%"}
        [($sealed.job_id != null) ($opened.job_id != null) (open --raw copy)]"""

    assert nu.gives(script) == [True, False, "note"]


def test_what_is_there_stays_unless_force_is_given(nu: Nu) -> None:
    nu.file("note", "new")
    target = nu.file("note.age", "old")

    assert "target_exists" in nu.fails("kms encrypt-file note")
    assert target.read_text() == "old"
    nu.gives("kms encrypt-file note --force")
    assert target.read_bytes().startswith(b"age-encryption.org/v1")
    assert "target_exists" in nu.fails("kms decrypt-file note.age")


@pytest.mark.parametrize("size", [10, 2 * MIB], ids=["call", "job"])
def test_a_tampered_file_leaves_nothing(nu: Nu, size: int) -> None:
    nu.file("plain", bytes(size))
    nu.gives("kms encrypt-file plain --context a=1")
    sealed = bytearray((nu.folder / "plain.age").read_bytes())
    sealed[-1] ^= 1
    nu.file("forged.age", bytes(sealed))
    before = sorted(nu.folder.iterdir())

    assert "decrypt_failed" in nu.fails("kms decrypt-file forged.age --context a=1")
    assert "decrypt_failed" in nu.fails("kms decrypt-file plain.age --output other --context a=2")

    assert sorted(nu.folder.iterdir()) == before


def test_a_pipe_is_a_source(nu: Nu) -> None:
    os.mkfifo(nu.folder / "pipe")
    script = """
        job spawn { "through a pipe" | save --force --raw pipe } | ignore
        kms encrypt-file pipe --output sealed | ignore
        kms decrypt-file sealed --output opened | ignore
        open --raw opened"""

    assert nu.gives(script) == "through a pipe"


# -- jobs --------------------------------------------------------------------------------------------


def test_items_become_a_job_and_its_result_a_table(nu: Nu) -> None:
    script = """
        let id = [alpha 0x[ff] {plaintext: gamma, context: {row: 3}}] | kms job submit encrypt
        let job = kms job wait $id --progress {|job| $job.state | save --append --raw states }
        let sealed = kms job result $id
        let opened = $sealed | first 2 | get ciphertext | kms job submit decrypt --wait
        let rows = kms job result $opened.job_id
        let third = $sealed.2.ciphertext | kms decrypt --context row=3
        let is_new = (date now) - $job.created_at < 1hr
        {state: $job.state, new: $is_new, plaintexts: $rows.plaintext, third: $third}"""

    found = nu.gives(script)

    assert found == {"state": "succeeded", "new": True, "plaintexts": ["alpha", [0xFF]], "third": "gamma"}
    assert (nu.folder / "states").read_text().endswith("succeeded")


def test_a_refused_item_fails_the_job_and_is_named(nu: Nu) -> None:
    script = "let id = [('x' | kms encrypt --context a=1)] | kms job submit decrypt --context a=2\n"

    assert "items_failed" in nu.fails(script + "kms job wait $id")
    waited = script + "try { kms job wait $id }\nkms job result $id | get error"
    assert nu.gives(waited) == ["decrypt_failed"]


def test_a_job_over_files_of_the_service(nu: Nu, secured: SecuredService) -> None:
    (secured.files / "in %1.txt").write_text("there")
    scope = f"jobs:read,jobs:write,encrypt read=file://{secured.files}/ write=file://{secured.files}/"
    token_file = nu.file("files.token", secured.new_token(scope)[1])
    script = (
        f"kms job submit encrypt '{secured.files}/in %1.txt' '{secured.files}/out.enc' --overwrite --wait"
    )

    assert nu.gives(f"{script} | get state", KMS_TOKEN_FILE=str(token_file)) == "succeeded"
    assert (secured.files / "out.enc").read_bytes().startswith(b"age-encryption.org/v1")


def test_the_result_of_a_file_job_is_bytes_or_a_file(nu: Nu) -> None:
    nu.file("big", bytes(2 * MIB))
    script = """
        let id = kms encrypt-file big | get job_id
        kms job result $id --output again | ignore
        [(kms job result $id | bytes length) (kms job get $id | get kind)]"""

    size, kind = nu.gives(script)

    sealed = (nu.folder / "big.age").read_bytes()
    assert (size, kind) == (len(sealed), "encrypt")
    assert (nu.folder / "again").read_bytes() == sealed
    assert mode(nu.folder / "again") == 0o600


class Breaking(QuietHandler):
    """A service whose line breaks in the middle of a result of 100 bytes."""

    def do_GET(self) -> None:  # noqa: N802 -- the library's name
        is_probe = "range" in self.headers
        self.send_response(206 if is_probe else 200)
        self.send_header("Content-Range", "bytes 0-0/100")
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", "1" if is_probe else "100")
        self.end_headers()
        self.wfile.write(b"x" if is_probe else b"x" * 50)


def test_a_download_that_breaks_off_leaves_nothing(bare: Nu) -> None:
    with served(Breaking) as port:
        url = f"http://127.0.0.1:{port}"
        said = bare.fails("kms job result some --output out", KMS_SERVICE_URL=url)

    assert "(service_unreachable)" in said
    assert [path.name for path in bare.folder.iterdir()] == ["script.nu"]


def test_a_job_that_waits_can_be_seen_and_cancelled(waiting: Nu) -> None:
    script = """
        let id = [x] | kms job submit encrypt --priority low
        let seen = kms job list --state queued --limit 1 | get 0
        let cancelled = kms job cancel $id
        [($seen.job_id == $id) $seen.priority $cancelled.state]"""
    assert waiting.gives(script) == [True, "low", "cancelled"]

    queued = "let id = [x] | kms job submit encrypt\n"
    assert "job_not_finished" in waiting.fails(queued + "kms job wait $id --timeout 200ms")
    assert "job_not_finished" in waiting.fails(queued + "kms job result $id")
    assert "job_cancelled" in waiting.fails(queued + "kms job cancel $id\nkms job wait $id")


def test_a_dead_letter_is_retried(waiting: Nu, no_worker: Service) -> None:
    job_id = waiting.gives("[x] | kms job submit encrypt")
    assert "job_not_dead" in waiting.fails(f"kms job retry {job_id}")

    forge(core_of(no_worker).worker_context.store, job_id, state="failed", error="attempts_exhausted")

    assert waiting.gives(f"kms job retry {job_id} | get state") == "queued"


# -- completions -------------------------------------------------------------------------------------


def offered(nu: Nu, line: str) -> list[str]:
    file = nu.file("line.nu", text := f"use nu/kms\n{line}")
    options = ["--no-config-file", "-I", str(ROOT), "--ide-complete", str(len(text))]
    command = [str(nu.program), *options, str(file)]
    ran = subprocess.run(
        command, env=nu.environ, capture_output=True, text=True, check=True, timeout=TIMEOUT_S
    )
    found: list[str] = json.loads(ran.stdout)["completions"]
    return found


def test_the_tab_key_offers_what_the_service_has(nu: Nu) -> None:
    job_id = nu.gives("[x] | kms job submit encrypt --wait | get job_id")

    assert offered(nu, "kms encrypt --key-id ") == ["default"]
    assert offered(nu, "kms keys --backend ") == ["age"]
    assert job_id in offered(nu, "kms job get ")
    assert offered(nu, "kms generate-key --key-spec ") == ["AES_128", "AES_256"]
    assert "committing" in offered(nu, "kms job list --state ")
    assert offered(nu, "kms job cancel ") == []


def by_default(nu: Nu, url: str) -> Nu:
    """The same, with a module whose default address is this one, and no other address."""
    folder = nu.folder / "nu" / "kms"
    folder.mkdir(parents=True)
    for file in MODULE.glob("*.nu"):
        (folder / file.name).write_text(file.read_text().replace("http://localhost:8082", url))
    return Nu(nu.program, nu.folder, {name: nu.environ[name] for name in ("KMS_TOKEN_FILE",)})


def test_a_default_address_is_that_of_the_service(nu: Nu, secured: SecuredService) -> None:
    assert by_default(nu, secured.url).gives("'hunter2' | kms encrypt | kms decrypt") == "hunter2"


@pytest.mark.parametrize("answer", [b"HTTP/1.1 404 No\r\n", b"HTTP/1.1 200 OK\r\nX-Request-ID: 1\r\n"])
def test_another_program_at_the_default_address_hears_no_secret(nu: Nu, answer: bytes) -> None:
    heard = []

    def serve(connection: socket.socket) -> None:
        heard.append(connection.recv(65536))
        connection.sendall(answer + b"Content-Length: 3\r\nConnection: close\r\n\r\nok\n")

    with scripted(serve) as stranger:
        said = by_default(nu, stranger.url).fails("'hunter2' | kms encrypt")

    assert "is not this service, so no secret was sent there" in said
    assert [request.split(b"\r\n")[0] for request in heard] == [b"GET /livez HTTP/1.1"]
    assert b"uthorization" not in heard[0]


def test_the_tab_key_is_silent_without_a_service(bare: Nu) -> None:
    away = Nu(bare.program, bare.folder, {"KMS_SERVICE_URL": f"http://127.0.0.1:{free_port()}"})

    assert offered(away, "kms encrypt --key-id ") == []


BEFORE: Final = '$env.config.completions.external.completer = {|spans| [$"before ($spans.0)"]}'


def test_the_script_of_the_kms_command_completes_beside_another(nu: Nu) -> None:
    script = subprocess.run([BIN / "kms", "completion", "nushell"], capture_output=True, check=True).stdout
    nu.file("kms.nu", script)

    def completed(*words: str) -> Any:  # noqa: ANN401 -- whatever JSON can say
        line = f"do $env.config.completions.external.completer {json.dumps(words)} | to json --raw | print"
        ran = nu.run(f"{BEFORE}\nsource kms.nu\n{line}", PATH=f"{BIN}:{os.environ['PATH']}")
        assert ran.returncode == 0, ran.stderr
        return json.loads(ran.stdout)

    job_id = nu.gives("[x] | kms job submit encrypt --wait | get job_id")
    assert completed("kms", "gener") == [
        {"value": "generate-key", "description": "Generate a data key, in plaintext and encrypted."}
    ]
    assert completed("kms", "encrypt", "--key-id", "") == [{"value": "default", "description": "age"}]
    assert {"value": job_id, "description": "encrypt succeeded"} in completed("kms", "job", "show", "")
    assert completed("kms", "xyzzy") == []
    assert completed("kms", "encrypt-file", "") is None  # nu offers the names of files
    assert completed("git", "") == ["before git"]


# -- errors ------------------------------------------------------------------------------------------


REFUSED: Final = [  # a script, the code of its error, what it points at, and a word of what to do next
    (
        "'x' | kms encrypt --context {a: 1} | kms decrypt --context {a: 2}",
        "decrypt_failed",
        "this context",
        "it was",
    ),
    (
        "'x' | kms encrypt --context {a: 1} | kms decrypt",
        "decrypt_failed",
        "without --context",
        "kms inspect",
    ),
    ("'hello' | kms decrypt", "not_a_ciphertext", "here", "kms encrypt"),
    ("'zz zz' | kms encrypt --key-id absent", "unknown_key", "", "kms keys"),
    ("open --raw in.bin | kms encrypt --key-id absent", "unknown_key", "this key-id", "kms keys"),
    ("open --raw in.bin | kms encrypt --context env", "invalid_context", "this context", "env=prod"),
    ("open --raw in.bin | kms encrypt --context {a: 1.5}", "invalid_context", "this context", "env=prod"),
    ("open --raw in.bin | kms encrypt --context {a: [b]}", "invalid_context", "this context", "env=prod"),
    ("random binary 1100000 | kms encrypt", "too_large", "", "encrypt-file"),
    ("random binary 9000000 | kms decrypt", "too_large", "here", "decrypt-file"),
    ("kms encrypt-file absent.txt", "no_such_file", "this source", ""),
    ("kms encrypt-file .", "no_such_file", "this source", ""),
    ("kms encrypt-file in.bin --output no/where", "no_such_directory", "this target", ""),
    ("kms decrypt-file in.bin", "no_output", "this source", ""),
    ("kms decrypt-file in.bin --output out", "not_a_ciphertext", "this source", "encrypt-file"),
    ("kms job get 0b7c1d2e-4f5a-4b6c-8d7e-9f0a1b2c3d4e", "unknown_job", "this job", "job list"),
    ("kms job list --state absent", "invalid_request", "here", "request id"),
    ("kms generate-key --key-spec AES_1", "invalid_request", "this key-spec", ""),
    ("kms status --url http://127.0.0.1:1", "service_unreachable", "here", "is the service up"),
    ("kms status --url localhost:8082", "bad_address", "here", ""),
    ("kms status --url http://me:secret@localhost", "bad_address", "here", ""),
    ("kms status --url http://kms.invalid", "in_clear", "here", "KMS_ALLOW_HTTP"),
    ("kms status --url http://127.0.0.1.x.invalid", "in_clear", "here", "KMS_ALLOW_HTTP"),
    ("$env.KMS_ALLOW_HTTP = 1; kms status --url http://kms.invalid", "service_unreachable", "here", ""),
    ("kms status --token-file absent", "bad_token", "this token-file", ""),
]


def test_an_error_names_its_cause_and_what_to_do(nu: Nu) -> None:
    """Nu is started once for all."""
    nu.file("in.bin", b"\xfe\xff" * 10)
    each = "\n".join(
        f"(try {{ {script}; 'it works' }} catch {{|error| $error.rendered }})" for script, *_ in REFUSED
    )
    ends = map(unframed, nu.gives(f"let said = [\n{each}\n]\n$said"))

    for said, (script, code, label, hint) in zip(ends, REFUSED, strict=True):
        assert f"({code})" in said, script
        assert (f"-- {label}" if label else "") in said, script
        assert hint in said, script
        assert "/nu/kms/" not in said, script  # no line of the module's own source


def test_a_problem_of_the_service_has_its_request_id(nu: Nu, secured: SecuredService) -> None:
    said = nu.fails("'x' | kms encrypt --context {a: 1} | kms decrypt")

    found = re.search(r"request id ([0-9a-f]{32})", said)
    assert found
    trail = "".join(path.read_text() for path in secured.state.rglob("*.jsonl"))
    assert f'"request_id":"{found[1]}"' in trail.replace(": ", ":")


def test_a_wrong_token_is_refused_everywhere(nu: Nu) -> None:
    nu.file("big", bytes(3 * MIB))
    nu.file("wrong", "kms_wrong")

    for script in ("kms status", "kms encrypt-file big", "[x] | kms job submit encrypt"):
        assert "(unauthenticated)" in nu.fails(f"{script} --token-file wrong")
    assert "kms_wrong" not in nu.fails("kms status --token-file wrong")
    assert [path.name for path in nu.folder.glob("*.enc*")] == []


def test_variables_of_the_session_are_used(nu: Nu, token_file: Path, secured: SecuredService) -> None:
    session = f"$env.KMS_TOKEN_FILE = '{token_file}'\n$env.KMS_SERVICE_URL = '{secured.url}'\n"

    assert Nu(nu.program, nu.folder, {}).gives(session + "kms status | get backend") == "age"


@pytest.mark.parametrize(
    "script",
    [
        f"'{CANARY}' | kms encrypt --key-id absent",
        f"'{CANARY}' | kms encrypt --context env",
        f"'{CANARY}' | kms encrypt --url nowhere",
        f"'{CANARY}' | kms encrypt --url http://127.0.0.1:1",
        f"let secret = '{CANARY}'\n$secret | kms encrypt --key-id absent",
        f"['{CANARY}'] | kms job submit encrypt --key-id absent",
        f"[{{plaintext: '{CANARY}'}}] | kms job submit encrypt --context env",
        f"'{CANARY}' | save --force note\nkms encrypt-file note --key-id absent",
    ],
    ids=["key", "context", "address", "away", "line before", "job", "record", "file"],
)
def test_no_error_quotes_a_line_that_holds_the_plaintext(nu: Nu, script: str) -> None:
    assert CANARY not in nu.fails(script)


def test_no_proxy_sees_a_secret_for_this_machine(nu: Nu) -> None:
    proxy = f"http://127.0.0.1:{free_port()}"
    is_old = "0.108" in str(nu.program)  # it takes no exception from a proxy, so the module refuses

    for variable in ("http_proxy", "ALL_PROXY"):
        if is_old:
            assert "(proxied)" in nu.fails("kms health", **{variable: proxy})
        else:
            assert nu.gives("kms health | get status", **{variable: proxy}) == "healthy"
            assert nu.gives(f"$env.{variable} = '{proxy}'\nkms health | get status") == "healthy"


# -- TLS ---------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def https_service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Service, Authority]]:
    """An API that serves HTTPS, and the authority of its certificate."""
    folder = tmp_path_factory.mktemp("secured")
    authority = Authority(folder / "servers")
    pair = authority.issue("server", x509.DNSName("localhost"), server=True)
    settings = f'[kms.server]\ntls_cert = "{pair.cert}"\ntls_key = "{pair.key}"\n'
    with Service(folder, settings, "unix:///nonexistent/valkey.sock") as running:
        yield running.start("api"), authority


def test_the_certificate_of_the_service_is_checked(
    bare: Nu, https_service: tuple[Service, Authority]
) -> None:
    service, authority = https_service
    url = f"https://localhost:{service.port}"

    assert (
        bare.gives(
            "'x' | kms encrypt | kms decrypt", KMS_SERVICE_URL=url, SSL_CERT_FILE=str(authority.ca_file)
        )
        == "x"
    )
    said = bare.fails("kms status", KMS_SERVICE_URL=url)
    assert "(untrusted_certificate)" in said
    assert "SSL_CERT_FILE" in said
