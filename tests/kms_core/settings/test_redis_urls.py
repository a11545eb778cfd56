"""``[kms.redis]``: which addresses are taken, what a Sentinel URL says, what libraries are told of TLS."""

import ssl
from pathlib import Path

import pytest

from kms_core import redis_client
from kms_core.settings.model import RedisSection
from kms_core.settings.redis_urls import ClusterNodes, Sentinels, cluster_nodes, sentinels
from kms_protocol.errors import ConfigurationError
from support.settings_files import read, refusal

SECRET = "hunter2"


def section_of(folder: Path, body: str) -> RedisSection:
    return read(folder, f"[kms.redis]\n{body}").kms.redis


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ('url = "http://h"', "kms.redis.url: expected one of redis://, rediss://, unix://"),
        ('url = "redis.example.com:6379"', "kms.redis.url: expected one of"),
        ('url = "redis://[h"', "kms.redis.url is not a URL"),
        ('broker_url = "memory://"', "kms.redis.broker_url: expected one of redis://"),
        ('broker_url = "amqp://u:hunter2@h;amqp://x"', "kms.redis.broker_url: one URL belongs there"),
        ('url = "sentinel://u:hunter2@h:1"', "a Sentinel URL names its master"),
        ('url = "sentinel://h/x?master=m"', "the path of a Sentinel URL is the number of a database"),
        ('url = "sentinel://h:99999?master=m"', "a port is a number up to 65535"),
        ('url = "sentinel://,h?master=m"', "expected sentinel://host:26379,host:26379/0?master=mymaster"),
        ('url = "sentinel://h?master=m&hunter2=1"', "a Sentinel URL has the options master"),
        ('url = "sentinel://h?master=m&master=n"', "a Sentinel URL has the options master"),
        ('url = "redis+cluster://h"', "kms.redis.broker_url: a Redis Cluster cannot be the broker"),
        (
            'broker_url = "rediss+cluster://u:hunter2@h"',
            "name another Redis or RabbitMQ in kms.redis.broker_url",
        ),
        ('url = "redis+cluster://u:hunter2@h/1"', "a Redis Cluster has only database 0"),
        ('url = "redis+cluster://h?hunter2=1"', "and its URL no options"),
        ('url = "redis+cluster://h,"', "expected redis+cluster://host:6379,host:6379"),
        ('url = "redis+cluster://h:99999"', "a port is a number up to 65535"),
        ('url = "rediss://:hunter2@h?ssl_cert_reqs=none"', "no ssl_* options belong there"),
        ('ca_file = "/ca.pem"', "kms.redis.ca_file is for TLS, and neither URL uses it"),
        (
            'url = "rediss://h"\nclient_key_file = "/k"',
            "client_cert_file and kms.redis.client_key_file belong",
        ),
    ],
)
def test_address_that_cannot_be_meant_is_refused(tmp_path: Path, body: str, said: str) -> None:
    refused = refusal(tmp_path, f"[kms.redis]\n{body}")

    assert said in refused
    assert SECRET not in refused


def test_sentinel_url_says_who_knows_the_master() -> None:
    url = "sentinels://kms:p%40%2Fw@a.example:26379,b.example,[::1]:7/3?master=m&sentinel_password=s%26w"

    assert sentinels("here", url) == Sentinels(
        hosts=(("a.example", 26379), ("b.example", 26379), ("::1", 7)),
        master="m",
        database=3,
        username="kms",
        password="p@/w",
        own_password="s&w",
    )


def test_cluster_url_names_nodes() -> None:
    found = cluster_nodes("here", "rediss+cluster://kms:p%40%2Fw@a.example:7000,b.example,[::1]:7/0")

    assert found == ClusterNodes(
        hosts=(("a.example", 7000), ("b.example", 6379), ("::1", 7)), username="kms", password="p@/w"
    )


def test_the_broker_follows_sentinel_in_words_of_kombu() -> None:
    url = "sentinel://kms:p%40w@a:1,[::1]:2/3?master=m"

    told = redis_client.celery_options(RedisSection(url=url, broker_url=url), {"global_keyprefix": "kms:"})

    assert told["broker_url"] == "sentinel://kms:p%40w@a:1/3;sentinel://[::1]:2/3"
    options = told["broker_transport_options"]
    assert isinstance(options, dict)
    assert (options["master_name"], options["global_keyprefix"]) == ("m", "kms:")
    assert "broker_use_ssl" not in told


@pytest.mark.parametrize("scheme", ["rediss", "sentinels", "amqps"])
def test_tls_is_always_checked(scheme: str) -> None:
    query = "?master=m" if scheme == "sentinels" else ""
    section = RedisSection(url="redis://h", broker_url=f"{scheme}://h{query}", ca_file=Path("/ca.pem"))

    told = redis_client.celery_options(section, {})["broker_use_ssl"]

    assert isinstance(told, dict)
    assert {"required", 2} & {told.get("ssl_cert_reqs"), told.get("cert_reqs")}
    assert told.get("ssl_check_hostname") or told.get("server_hostname") == "h"
    assert scheme == "amqps" or told["ssl_exclude_verify_flags"] == [ssl.VERIFY_X509_STRICT]
    assert "/ca.pem" in told.values()


def test_a_malformed_url_of_the_broker_is_named_as_such() -> None:
    section = RedisSection(url="redis://h", broker_url="redis://[h")

    with pytest.raises(ConfigurationError, match=r"kms.redis.broker_url .* is not a URL"):
        redis_client.celery_options(section, {})


def test_a_password_in_a_file_is_that_of_both_urls(tmp_path: Path) -> None:
    (tmp_path / "password").write_text("p@ss/word\n")
    section = section_of(
        tmp_path,
        f'url = "redis://kms@h:6379/0"\nbroker_url = "sentinel://kms@a,b:2?master=m"\n'
        f'password_file = "{tmp_path}/password"\n',
    )

    found = redis_client.connect(section).connection_pool.connection_kwargs
    assert (found["username"], found["password"], found["host"]) == ("kms", "p@ss/word", "h")
    broker = redis_client.celery_options(section, {})["broker_url"]
    assert broker == "sentinel://kms:p%40ss%2Fword@a:26379/0;sentinel://b:2/0"


@pytest.mark.parametrize(
    ("content", "url", "said"),
    [
        (None, "redis://h", "kms.redis.password_file: cannot read"),
        ("\n", "redis://h", "is empty"),
        ("x", f"redis://:{SECRET}@h", "the password is in kms.redis.password_file, or here, and not both"),
    ],
    ids=["missing", "empty", "twice"],
)
def test_a_password_that_cannot_be_used_is_refused(
    tmp_path: Path, content: str | None, url: str, said: str
) -> None:
    if content is not None:
        (tmp_path / "password").write_text(content)

    with pytest.raises(ConfigurationError) as refused:
        redis_client.connect(section_of(tmp_path, f'url = "{url}"\npassword_file = "{tmp_path}/password"\n'))

    assert said in refused.value.detail
    assert SECRET not in refused.value.detail
