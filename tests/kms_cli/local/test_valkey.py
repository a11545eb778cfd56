import os
import signal
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Final

import pytest
import redis

from kms_cli.local import directories
from kms_cli.local import valkey as embedded
from kms_cli.local.valkey import ValkeyFiles
from kms_core.programs import tether
from kms_protocol.errors import ConfigurationError, Conflict, Unavailable
from support.embedded_valkey import EmbeddedValkey
from support.programs import program, tethered
from support.waiting import WAIT_S, until


@contextmanager
def client_of(url: str) -> Iterator[redis.Redis]:
    with redis.Redis.from_url(url, retry=redis.retry.Retry(redis.backoff.NoBackoff(), 0)) as client:
        yield client


def send(url: str, words: str) -> object:
    with client_of(url) as client:
        answer: object = client.execute_command(*words.split())  # type: ignore[no-untyped-call]  # redis has none
    return answer


def start_binary(binary: Path, place: ValkeyFiles) -> subprocess.Popen[bytes]:
    command = embedded.command(binary, place)
    process = tether.spawn(command, env={}, output=subprocess.DEVNULL, pass_fds=[place.lock])
    until(lambda: embedded.is_ready(place.socket_path), "the server is ready")
    return process


# -- where it is and who may come in -----------------------------------------------------------------


def test_socket_and_data_are_for_the_user_alone(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        place = server.files
        made = [place.socket_path, place.socket_path.parent, *(tmp_path / "valkey").rglob("*")]

        assert [str(path) for path in made if path.stat().st_mode & 0o077] == []


def test_there_is_no_network_port(redis_url: str) -> None:
    with client_of(redis_url) as client:
        server = client.info("server")

    assert isinstance(server, dict)
    assert server["tcp_port"] == 0


def test_server_has_no_environment_and_writes_no_core(valkey: EmbeddedValkey) -> None:
    process = Path(f"/proc/{valkey.pid}")
    names = {line.partition("=")[0] for line in (process / "environ").read_text().split("\0") if line}
    (cores,) = (line for line in (process / "limits").read_text().splitlines() if "core file" in line)

    assert names <= {"LC_CTYPE"}  # Python's, in a C locale
    assert cores.split()[4:6] == ["0", "0"]


REFUSED: Final = (
    "FLUSHALL | FLUSHDB | MONITOR | SHUTDOWN | ACL LIST | MODULE LIST | SCRIPT FLUSH | DEBUG SLEEP 0"
    " | CLIENT KILL TYPE normal | CONFIG SET dir /tmp | CONFIG GET dir | REPLICAOF 127.0.0.1 1"
    " | KEYS * | SCAN 0 | SET other:key 1 | PUBLISH other 1 | EVAL return(redis.call('GET','other')) 0"
)
ALLOWED: Final = (
    "HELLO 3 | TIME | INFO memory | CLIENT SETNAME kms | SELECT 1"
    " | SET kms:a 1 NX PX 1000 | SETEX kms:a 10 1 | GET kms:a | INCRBY kms:n 2 | DECR kms:n"
    " | HSET kms:h a 1 b 2 | HSETNX kms:h c 3 | HINCRBY kms:h a 1 | HMGET kms:h a b | HGETALL kms:h"
    " | ZADD kms:z NX 1 a | ZRANGEBYSCORE kms:z -inf +inf LIMIT 0 1 | ZRANGE kms:z 0 -1 BYSCORE"
    " | ZCOUNT kms:z 0 1 | ZCARD kms:z | ZSCORE kms:z a | ZREM kms:z a"
    " | XADD kms:x MAXLEN ~ 10 * a 1 | XREAD COUNT 1 STREAMS kms:x 0 | XRANGE kms:x - +"
    " | XTRIM kms:x MAXLEN 1 | XLEN kms:x | LPUSH kms:l 1 | BRPOP kms:l 0.01 | LLEN kms:l | LRANGE kms:l 0 -1"
    " | EXPIRE kms:h 10 | PEXPIRE kms:h 10 | TTL kms:h | EXISTS kms:h | DEL kms:h"
    " | EVAL return(redis.call('TIME')) 0 | SCRIPT LOAD return(1) | PUBLISH kms:c 1"
)


@pytest.mark.parametrize("words", REFUSED.split(" | "))
def test_what_jobs_do_not_need_is_refused(redis_url: str, words: str) -> None:
    with pytest.raises(redis.ResponseError, match=r"permission|not allowed"):
        send(redis_url, words)


@pytest.mark.parametrize("words", ALLOWED.split(" | "))
def test_what_jobs_need_is_allowed(redis_url: str, words: str) -> None:
    send(redis_url, words)


CELERY_APP = """
import os, celery
app = celery.Celery(broker=os.environ["BROKER"], backend=os.environ["BROKER"])
prefixed = {"global_keyprefix": "kms:", "visibility_timeout": 60}
app.conf.update(
    broker_transport_options=prefixed, result_backend_transport_options=prefixed,
    task_acks_late=True, worker_enable_remote_control=False, worker_prefetch_multiplier=1,
    task_queue_max_priority=10,
)
@app.task(name="add")
def add(a, b):
    return a + b
"""


def test_celery_works_within_the_access_list(tmp_path: Path, broker_url: str) -> None:
    (tmp_path / "sums.py").write_text(CELERY_APP)
    env = {"BROKER": broker_url, "PATH": os.environ["PATH"], "PYTHONPATH": str(tmp_path)}
    worker = ["-m", "celery", "-A", "sums", "worker", "-P", "solo", "--without-gossip", "--without-mingle"]
    ask = "import sums; print([sums.add.apply_async((n, 1), priority=n).get(timeout=20) for n in (0, 9)])"
    with (tmp_path / "log").open("wb") as log:
        command = tethered(sys.executable, *worker)
        process = subprocess.Popen(command, env=env, cwd=tmp_path, stdout=log, stderr=log)
        asked = [sys.executable, "-c", ask]
        answer = subprocess.run(asked, env=env, cwd=tmp_path, check=False, capture_output=True, text=True)
        process.send_signal(signal.SIGTERM)
        process.wait(WAIT_S)

    assert answer.stdout == "[1, 10]\n", answer.stderr
    assert "NoPermission" not in (tmp_path / "log").read_text()


# -- what is kept ------------------------------------------------------------------------------------


def test_acknowledged_writes_survive_a_kill(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        for number in range(200):
            client.rpush("kms:list", number)
        os.kill(server.pid, signal.SIGKILL)
        server.start()

        assert client.llen("kms:list") == 200


def test_data_stays_and_the_socket_goes_when_it_stops(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        client.set("kms:a", "1")
        socket_dir = server.files.socket_path.parent
    gone = not socket_dir.exists()
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        locked_cache = client.get("kms:a")

    assert gone
    assert locked_cache == b"1"


def fill(client: redis.Redis, size_mib: int) -> None:
    for number in range(size_mib):
        client.set(f"kms:{number}", bytes(1024 * 1024))


def test_full_server_refuses_and_forgets_nothing(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path, options=("--maxmemory", "16mb")) as server, client_of(server.url) as client:
        client.set("kms:first", "1")

        with pytest.raises(redis.OutOfMemoryError):
            fill(client, 32)
        assert client.get("kms:first") == b"1"


def test_data_moves_to_redis_and_back(tmp_path: Path) -> None:
    ours = embedded.find_binary({})
    for binary in (ours, Path(program("redis-server")), ours):
        with embedded.claim(tmp_path, {}) as place, client_of(place.url_of(0)) as client:
            process = start_binary(binary, place)
            client.incr("kms:starts")
            client.close()
            process.terminate()
            process.wait(WAIT_S)
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        assert client.get("kms:starts") == b"3"


@pytest.mark.parametrize("part", [b"", b"*3\r\n$3\r\nSET\r\n$5\r\nkms:b\r\n$9\r\n123"], ids=["zeros", "part"])
def test_zeros_that_a_power_cut_left_are_cut(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], part: bytes
) -> None:
    """Valkey refuses them, although the writes before them were acknowledged."""
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        client.set("kms:a", b"ends in zeros\0\0")
    (log,) = (tmp_path / "valkey/appendonlydir").glob("*.incr.aof")
    log.write_bytes(log.read_bytes() + part + bytes(100_000))

    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        found = client.get("kms:a"), client.get("kms:b")

    assert found == (b"ends in zeros\0\0", None)
    assert f"cut 100000 zero bytes off {log}" in capfd.readouterr().err


def test_damaged_data_is_told_with_the_servers_own_words(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server, client_of(server.url) as client:
        client.set("kms:a", "1")
    (log,) = (tmp_path / "valkey/appendonlydir").glob("*.incr.aof")
    log.write_bytes(b"not a command\r\n" + log.read_bytes())

    with pytest.raises(Unavailable, match=r"ended with status 1: .*Bad file format.*valkey\.log"):
        EmbeddedValkey(tmp_path).start()


# -- one at a time, and never an orphan --------------------------------------------------------------


def test_second_server_on_one_state_is_refused(tmp_path: Path) -> None:
    with EmbeddedValkey(tmp_path) as server:
        with pytest.raises(Conflict, match="Another Valkey server uses"):
            EmbeddedValkey(tmp_path).start()
        with client_of(server.url) as client:
            assert client.ping()


def test_server_whose_starter_let_go_still_holds_the_state(tmp_path: Path) -> None:
    with embedded.claim(tmp_path, {}) as place:
        process = start_binary(embedded.find_binary({}), place)

    with pytest.raises(Conflict), embedded.claim(tmp_path, {}):
        pass
    process.terminate()
    process.wait(WAIT_S)
    with embedded.claim(tmp_path, {}) as again:
        assert again.data_dir == tmp_path / "valkey"


STARTER = """
import sys, time, pathlib
from support.embedded_valkey import EmbeddedValkey
print(EmbeddedValkey(pathlib.Path(sys.argv[1])).start().pid, flush=True)
time.sleep(60)
"""


def test_server_dies_with_its_starter(tmp_path: Path) -> None:
    command: Sequence[str | Path] = [sys.executable, "-c", STARTER, tmp_path]
    env = {**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])}
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as starter:
        assert starter.stdout
        server = Path("/proc", starter.stdout.readline().strip())
        assert server.exists()
        starter.kill()

    until(lambda: not server.exists(), "the server has ended")
    with EmbeddedValkey(tmp_path) as after:  # over the socket that the dead one left
        assert after.pid


# -- the short directory for the socket --------------------------------------------------------------


def test_socket_lives_in_the_sessions_runtime_directory(tmp_path: Path) -> None:
    with (
        TemporaryDirectory(prefix="r u?n%é", dir="/tmp") as session,  # tmp_path may be too long for a socket
        EmbeddedValkey(tmp_path / "state", environ={"XDG_RUNTIME_DIR": session}) as server,
        client_of(server.url) as client,
    ):
        assert client.ping()
        assert server.files.socket_path.parent.parent == Path(session)
        assert server.files.socket_path.parent.name.startswith("kms-")


@pytest.mark.parametrize("session", ["", "relative", "/nonexistent", "/dev/null", "open", "long"])
def test_what_is_no_runtime_directory_is_not_used(tmp_path: Path, session: str) -> None:
    made = {"open": tmp_path / "open", "long": tmp_path / ("long" * 25)}
    made["open"].mkdir()
    made["open"].chmod(0o777)
    made["long"].mkdir(mode=0o700)

    found = directories.runtime_dir(tmp_path, {"XDG_RUNTIME_DIR": str(made.get(session, session))})

    assert str(found).startswith(f"/tmp/kms-{os.geteuid()}-")


def test_squatted_socket_directory_is_refused(tmp_path: Path) -> None:
    wanted = directories.runtime_dir(tmp_path, {})
    wanted.symlink_to(tmp_path)
    try:
        with pytest.raises(ConfigurationError, match="symbolic link"), embedded.claim(tmp_path, {}):
            pass
    finally:
        wanted.unlink()


def test_directory_open_to_others_is_refused_and_left_alone(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir(mode=0o755)

    with pytest.raises(ConfigurationError, match="chmod 700"), embedded.claim(tmp_path, {}):
        pass
    assert (tmp_path / "valkey").stat().st_mode & 0o777 == 0o755


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a directory away")
def test_directory_of_another_user_is_refused(tmp_path: Path) -> None:
    (tmp_path / "valkey").mkdir(mode=0o700)
    os.chown(tmp_path / "valkey", 65534, 65534)

    with pytest.raises(ConfigurationError, match="belongs to user 65534"), embedded.claim(tmp_path, {}):
        pass
