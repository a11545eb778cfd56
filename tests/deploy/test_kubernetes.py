"""deploy/helm: rendered by Helm, judged by the schemas, and at one with the service's own words."""

import json
import re
import sys
import tarfile
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

import pytest
import yaml

from kms_core.backends.age_settings import AgeSection
from kms_core.backends.cosmian.settings import CosmianSection
from kms_core.backends.vault.settings import TransitSection
from kms_core.observability import metrics
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings
from kms_core.settings.validation import check_exposure
from support.artefacts import (
    CHART,
    EXAMPLES,
    INSTALLS,
    OLDEST,
    RECOVERY_RECIPIENT,
    ROOT,
    SEALED,
    Document,
    helm,
    passes,
    rendered,
    run,
)
from support.programs import BUILD_LIMIT_S, built_with_go, venv_program

pytestmark = pytest.mark.timeout(BUILD_LIMIT_S)  # the first run builds Helm

VERSIONS: Final = (OLDEST, "1.37")
"""The oldest that knows every field used here, and the newest."""
CUSTOM: Final = ("keda.sh/", "monitoring.coreos.com/")
PODS: Final = ("Deployment", "StatefulSet")
"""Kinds with a template of pods."""
RESTRICTED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
Installs = dict[str, list[Document]]


@pytest.fixture(scope="module")
def installs() -> Installs:
    return {name: rendered(name) for name in INSTALLS}


def refused(*words: str) -> str:
    """Why Helm renders nothing of the first example with further words."""
    argv = (
        "template",
        "kms-service",
        CHART,
        "--kube-version",
        f"{OLDEST}.0",
        "-f",
        EXAMPLES / "openbao.yaml",
    )
    done = run(built_with_go("helm"), *argv, "--set", f"firstKey.recovery={RECOVERY_RECIPIENT}", *words)
    assert done.returncode != 0, done.stdout
    return done.stderr


def named(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def kms_toml(documents: list[Document]) -> str:
    text: str = named(documents, "ConfigMap", "kms-service")["data"]["kms.toml"]
    return text


def pods(documents: list[Document]) -> dict[str, Document]:
    return {each["metadata"]["name"]: each["spec"]["template"] for each in documents if each["kind"] in PODS}


def each_pod(installs: Installs) -> list[tuple[str, Document]]:
    return [(name, pod) for documents in installs.values() for name, pod in pods(documents).items()]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_as_the_schema_says(installs: Installs, version: str, tmp_path: Path) -> None:
    documents = {json.dumps(document) for made in installs.values() for document in made}
    files = []
    for number, text in enumerate(sorted(documents)):
        if not json.loads(text)["apiVersion"].startswith(CUSTOM):
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(text)

    passes(venv_program("kubernetes-validate"), "-k", version, "--strict", *files)

    assert len(files) > 20


def test_objects_of_operators_are_as_their_models_say_and_nothing_is_unknown(installs: Installs) -> None:
    kinds = ["PodMonitor", "PrometheusRule", "ScaledObject"]
    ours = [document for document in installs["openbao"] if document["kind"] in kinds]
    misspelt = json.loads(json.dumps(named(ours, "PodMonitor", "kms-service")))
    misspelt["spec"]["podMetricsEndpoints"][0]["relabellings"] = []
    judge = Path(__file__).parents[1] / "support/custom_resources.py"

    judged = run(sys.executable, "-W", "ignore", judge, input=yaml.safe_dump_all([*ours, misspelt]))

    assert sorted(judged.stdout.split()) == ["PodMonitor", "PodMonitor", *kinds], judged.stderr
    assert judged.stderr == "unknown: PodMonitor.spec.podMetricsEndpoints[0].relabellings\n"


# -- the chart -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("example", INSTALLS)
def test_helm_finds_no_fault(example: str) -> None:
    said = helm("lint", "--strict", CHART, "--namespace", "kms", "--values", EXAMPLES / f"{example}.yaml")

    assert "1 chart(s) linted, 0 chart(s) failed" in said
    assert "[WARNING]" not in said


def test_every_example_is_tested() -> None:
    assert {path.stem for path in EXAMPLES.iterdir()} == set(INSTALLS)


def test_the_packed_chart_makes_the_same_and_carries_no_test(installs: Installs, tmp_path: Path) -> None:
    """Rules and dashboards are links in the tree, and files in the archive."""
    helm("package", CHART, "--destination", tmp_path)
    (archive,) = tmp_path.iterdir()
    with tarfile.open(archive) as packed:
        names = packed.getnames()

    assert rendered("openbao", chart=archive) == installs["openbao"]
    assert not [name for name in names if "/tests/" in name]


def test_every_value_is_in_the_schema_and_no_other_is_taken() -> None:
    def paths(value: object, schema: dict[str, Any], where: str) -> Iterator[str]:
        if isinstance(value, dict) and schema.get("additionalProperties") is False:
            for name in value.keys() ^ schema["properties"].keys():
                yield f"{where}.{name}"
            for name in value.keys() & schema["properties"].keys():
                yield from paths(value[name], schema["properties"][name], f"{where}.{name}")

    schema = json.loads((CHART / "values.schema.json").read_text())
    values = yaml.safe_load((CHART / "values.yaml").read_text())

    assert list(paths(values, schema, "")) == [".global"]


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("api.replica=3", "replica"),
        ("redis.url=rediss://kms:secret@redis.example.com:6379/0", "/redis/url"),
        ("image.digest=sha256:0123", "/image/digest"),
        ("persistence.kind=shared", "/persistence/kind"),
        ("store.endpoint=http://s3.example.com", "/store/endpoint"),
        ("store.spool=", "store.spool and store.state are required"),
        ("store.state=", "store.spool and store.state are required"),
        ("secrets.bucket=", "secrets.bucket is required with store.accessKeyId"),
        ("secrets.keys=", "secrets.keys is required"),
        ("ingress.tlsSecret=", "ingress.tlsSecret is required"),
        ("ingress.host=", "ingress.host is required"),
        ("firstKey.recovery=", "firstKey.recovery is required"),
        ("firstKey.recovery=AGE-SECRET-KEY-1", "/firstKey/recovery"),
    ],
)
def test_values_that_cannot_work_are_refused_with_their_name(words: str, reason: str) -> None:
    assert reason in refused("--set", words)


def test_an_image_is_named_by_the_digest_that_was_set() -> None:
    digest = f"sha256:{'0123456789abcdef' * 4}"
    made = rendered(
        "openbao", "--set", f"image.repository=registry.example.com/kms,image.tag=1.2.3,image.digest={digest}"
    )

    images = {pod["spec"]["containers"][0]["image"] for pod in pods(made).values()}
    assert images == {f"registry.example.com/kms:1.2.3@{digest}"}


def test_an_image_of_others_is_named_by_registry_and_digest(installs: Installs) -> None:
    images = {
        container["image"]
        for documents in installs.values()
        for pod in pods(documents).values()
        for container in pod["spec"]["containers"]
    }

    others = {image for image in images if not image.startswith("provisioning/kms-service:")}
    assert len(others) == 1
    assert all(re.fullmatch(r"docker\.io/\S+:[\w.]+@sha256:[0-9a-f]{64}", image) for image in others)


def test_two_releases_of_a_namespace_share_no_name() -> None:
    one, two = (
        {(each["kind"], each["metadata"]["name"]) for each in rendered("openbao", release=release)}
        for release in ("kms-service", "payments")
    )

    assert not one & two
    assert ("Service", "payments-kms-service") in two


TRICKY: Final = {
    "jobs": {"inline_bytes": 0, "spool_max_bytes": 10_737_418_240, "stall_s": 1},
    "tenants": {"pay ments": {"keys": ["a<b>&\"c'", "${X}", "\\"], "requests_per_s": 0.25}},
    "keys": {"mail": ["transit:mail", "age:///x?native=false"]},
    "auth": {"issuers": {"corp": {"grants": {"ci": {"when": {"ref": "refs/heads/main"}, "scopes": []}}}}},
    "log": {"level": "line\nand \u00e9"},
}


def test_settings_are_laid_over_those_of_the_chart_as_they_are(installs: Installs, tmp_path: Path) -> None:
    def over(below: dict[str, Any], above: dict[str, Any]) -> dict[str, Any]:
        return below | {
            name: over(below.get(name, {}), value) if isinstance(value, dict) else value
            for name, value in above.items()
        }

    before = tomllib.loads(kms_toml(installs["openbao"]))["kms"]
    (tmp_path / "more.yaml").write_text(yaml.safe_dump({"settings": TRICKY}))
    after = tomllib.loads(kms_toml(rendered("openbao", "--values", tmp_path / "more.yaml")))["kms"]

    assert after == over(before, TRICKY)
    assert repr(after["jobs"]["spool_max_bytes"]) == "10737418240", "an integer stays one"


def test_changed_settings_roll_the_pods(installs: Installs) -> None:
    def checksums(documents: list[Document]) -> set[str]:
        return {
            each["metadata"]["annotations"]["checksum/settings"]
            for name, each in pods(documents).items()
            if "valkey" not in name
        }

    (before,), (after,) = (
        checksums(installs["openbao"]),
        checksums(rendered("openbao", "--set", "settings.port=8082")),
    )

    assert before != after


# -- names and what is promised ------------------------------------------------------------------------------


def test_names_are_those_that_were_documented(installs: Installs) -> None:
    documents = installs["cosmian"]
    api = named(documents, "Deployment", "kms-service")["spec"]["template"]["spec"]
    container = api["containers"][0]

    assert container["name"] == "kms-service"
    assert re.fullmatch(r"provisioning/kms-service:\d+\.\d+\.\d+(\.dev\d+)?", container["image"])
    assert container["ports"] == [{"name": "http", "containerPort": 8082}]
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "PROVISIONING_ENV": "prod",
        "COSMIAN_KMS_URL": "https://kms.example.com",
    }
    assert "cosmian-api-key" in {each["secret"]["secretName"] for each in api["volumes"] if "secret" in each}
    assert named(documents, "Service", "kms-service")["spec"]["ports"][0]["port"] == 8082
    assert named(documents, "HorizontalPodAutoscaler", "kms-service")["spec"]["minReplicas"] == 2


def test_a_pod_may_do_no_more_than_it_must(installs: Installs) -> None:
    for name, pod in each_pod(installs):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert not spec.keys() & {"hostNetwork", "hostPID", "hostIPC", "initContainers"}, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["runAsUser"] > 10_000, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == RESTRICTED, name
            assert not container.get("envFrom"), name
            assert not [each["name"] for each in container.get("env", ()) if "valueFrom" in each], name
            assert container["resources"].keys() == {"requests", "limits"}, name
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name


@pytest.mark.parametrize("example", SEALED)
def test_the_first_key_is_made_once_with_the_rights_of_the_api(installs: Installs, example: str) -> None:
    job = named(installs[example], "Job", "kms-service-first-key")["spec"]["template"]["spec"]
    api = pods(installs[example])["kms-service"]["spec"]
    (made,), (asked,) = job["containers"], api["containers"]
    settings = tomllib.loads(kms_toml(installs[example]))["kms"]

    for field in (
        "securityContext",
        "serviceAccountName",
        "automountServiceAccountToken",
        "enableServiceLinks",
    ):
        assert job[field] == api[field], field
    for field in ("securityContext", "image", "env", "volumeMounts"):
        assert made[field] == asked[field], field
    assert made["command"][:2] == ["kms", "keygen"]
    words = dict(zip(made["command"][2::2], made["command"][3::2], strict=True))
    assert words == {
        "--sealed-by": "root",
        "--for": "default",
        "--recovery": RECOVERY_RECIPIENT,
        "--output": settings["keys"]["default"].removeprefix("age:"),
    }
    again = rendered(example, "--is-upgrade")
    assert not [each for each in again if each["kind"] == "Job"]


def mounts(container: Document) -> set[str]:
    return {each["mountPath"] for each in container["volumeMounts"]}


def test_a_probe_asks_a_port_that_there_is_and_no_backend(installs: Installs) -> None:
    for name, pod in each_pod(installs):
        (container,) = pod["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[kind].get("httpGet") or container[kind].get("tcpSocket") or {"port": None}
            is_tls = asked.get("scheme") == "HTTPS"
            assert is_tls == (container["name"] == "kms-service" and "/run/secrets/tls" in mounts(container))
            assert asked["port"] in {*ports, None}, name
            takes_jobs = kind == "readinessProbe" and container["name"] == "kms-worker"
            assert asked.get("path") in {"/readyz" if takes_jobs else "/livez", None}, name


def test_what_is_mounted_is_a_volume_and_each_volume_is_mounted(installs: Installs) -> None:
    for documents in installs.values():
        for each in (document for document in documents if document["kind"] in PODS):
            spec = each["spec"]["template"]["spec"]
            mounted = {mount["name"] for mount in spec["containers"][0]["volumeMounts"]}
            claims = each["spec"].get("volumeClaimTemplates", ())
            volumes = [
                *(volume["name"] for volume in spec["volumes"]),
                *(claim["metadata"]["name"] for claim in claims),
            ]
            assert sorted(mounted) == sorted(volumes), each["metadata"]["name"]


def workload(documents: list[Document], name: str) -> Document:
    (found,) = [each for each in documents if each["kind"] in PODS and each["metadata"]["name"] == name]
    return found


def test_no_replicas_are_set_where_a_scaler_sets_them(installs: Installs) -> None:
    for example, documents in installs.items():
        scaled = {
            (each["spec"]["scaleTargetRef"]["kind"], each["spec"]["scaleTargetRef"]["name"])
            for each in documents
            if each["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}
        }
        replicas = {
            (each["kind"], each["metadata"]["name"]): each["spec"].get("replicas")
            for each in documents
            if each["kind"] in PODS
        }
        assert {each for each, count in replicas.items() if count is None} == scaled, example
        assert all(count is None or count >= 1 for count in replicas.values()), (
            "workers also expire and rotate"
        )


def test_a_selector_finds_the_pods_that_it_means(installs: Installs) -> None:
    for documents in installs.values():
        labels = {name: pod["metadata"]["labels"] for name, pod in pods(documents).items()}
        for each in documents:
            if each["kind"] in {"Service", "PodDisruptionBudget", "PodMonitor"}:
                selector = each["spec"]["selector"]
                wanted = selector.get("matchLabels", selector).items()
                chosen = [name for name, found in labels.items() if wanted <= found.items()]
                assert chosen == [each["metadata"]["name"]], each["kind"]


def test_nothing_may_pass_that_no_policy_names(installs: Installs) -> None:
    for documents in installs.values():
        closed = named(documents, "NetworkPolicy", "kms-service-deny-all")["spec"]
        assert closed["policyTypes"] == ["Ingress", "Egress"]
        assert closed.keys() == {"podSelector", "policyTypes"}
        for pod in pods(documents).values():
            assert closed["podSelector"]["matchLabels"].items() <= pod["metadata"]["labels"].items()
        egress = named(documents, "NetworkPolicy", "kms-service-egress")["spec"]["egress"]
        blocks = [to["ipBlock"] for rule in egress for to in rule["to"] if "ipBlock" in to]
        assert "169.254.0.0/16" in blocks[0]["except"], "where the cloud hands out the node's credentials"


def test_what_the_settings_call_is_on_a_port_that_the_policy_opens(
    installs: Installs, tmp_path: Path
) -> None:
    for example in SEALED:
        kms = settings_of(installs[example], tmp_path)
        addresses = [kms.kms.redis.url, str(kms.kms.jobs.spool_bucket and kms.kms.jobs.spool_bucket.endpoint)]
        addresses += [str(kms.backend(TransitSection).address), str(kms.backend(CosmianSection).server_url)]
        egress = named(installs[example], "NetworkPolicy", "kms-service-egress")["spec"]["egress"]
        (ports,) = [rule["ports"] for rule in egress if "ipBlock" in rule["to"][0]]
        called = {urlsplit(address).port or 443 for address in addresses if "://" in address}
        assert called <= {each["port"] for each in ports}, example


def test_callers_of_the_ingress_use_tls_and_a_name_that_the_service_knows(
    installs: Installs, tmp_path: Path
) -> None:
    spec = named(installs["openbao"], "Ingress", "kms-service")["spec"]
    hosts = {rule["host"] for rule in spec["rules"]}

    assert {host for each in spec["tls"] for host in each["hosts"]} == hosts
    assert hosts <= set(settings_of(installs["openbao"], tmp_path).kms.server.allowed_hosts)
    for rule in spec["rules"]:
        for path in rule["http"]["paths"]:
            service = named(installs["openbao"], "Service", path["backend"]["service"]["name"])
            assert path["backend"]["service"]["port"]["name"] in {
                each["name"] for each in service["spec"]["ports"]
            }


# -- at one with the service ---------------------------------------------------------------------------------


def variables(documents: list[Document]) -> dict[str, str]:
    """Those of the API's container."""
    (container,) = pods(documents)["kms-service"]["spec"]["containers"]
    return {each["name"]: each["value"] for each in container["env"]}


def settings_of(documents: list[Document], folder: Path) -> Settings:
    """What the API reads: its variables, and the file of the ConfigMap that it mounts."""
    spec = pods(documents)["kms-service"]["spec"]
    (volume,) = [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
    assert volume == "kms-service"
    (folder / "kms.toml").write_text(kms_toml(documents))
    loaded = load_settings(folder / "kms.toml", variables(documents))
    check_exposure(loaded)
    return loaded


KEYS: Final = {
    "keys": {"spool.key", "intake.key"},
    "redis": {"password"},
    "bucket": {"secret-key"},
    "tls": {"tls.crt", "tls.key"},
}
"""What the comments of values.yaml say that Secrets have, by their directories."""
OF_EXAMPLE: Final = {
    "openbao": KEYS | {"key-server": {"token"}},
    "cosmian": KEYS | {"key-server": {"api-key"}},
    "aws": {name: keys for name, keys in KEYS.items() if name != "bucket"},  # a role of the service account
    "trial": {"keys": KEYS["keys"] | {"private_key.txt", "public_key.txt"}, "redis": KEYS["redis"]},
}


@pytest.mark.parametrize("example", INSTALLS)
def test_the_service_finds_each_secret_where_its_settings_say(
    installs: Installs, example: str, tmp_path: Path
) -> None:
    settings = settings_of(installs[example], tmp_path)
    for name in ("kms-service", "kms-service-worker"):
        spec = pods(installs[example])[name]["spec"]
        places = {each["name"]: each for each in spec["containers"][0]["volumeMounts"]}
        secret = {each["name"]: each["secret"] for each in spec["volumes"] if "secret" in each}
        assert {places[volume]["mountPath"] for volume in secret} == {
            f"/run/secrets/{directory}" for directory in OF_EXAMPLE[example]
        }
        assert all(places[volume]["readOnly"] for volume in secret)
        assert {each["defaultMode"] for each in secret.values()} == {0o440}, "others may read it"
    mounted = {
        f"/run/secrets/{directory}/{key}" for directory, keys in OF_EXAMPLE[example].items() for key in keys
    }

    assert set(re.findall(r"/run/secrets/[\w./-]+", kms_toml(installs[example]))) == mounted
    assert settings.kms.auth.mode == "required"


@pytest.mark.parametrize("example", INSTALLS)
def test_the_service_reads_its_settings_and_accepts_nothing_weak_in_production(
    installs: Installs, example: str, tmp_path: Path
) -> None:
    loaded = settings_of(installs[example], tmp_path)

    if example in SEALED:
        assert (loaded.environment, loaded.kms.accept_weak) == ("prod", ())
        assert loaded.backend(AgeSection).sealed_only
        assert [name for name, key in loaded.kms.all_keys.items() if key.use == "seal"] == ["root"]
    else:
        assert loaded.environment == "dev"


@pytest.mark.parametrize("example", SEALED)
def test_pods_share_no_volume_and_an_audit_log_outlives_its_pod(
    installs: Installs, example: str, tmp_path: Path
) -> None:
    documents, settings = installs[example], settings_of(installs[example], tmp_path)

    assert "ReadWriteMany" not in json.dumps(documents)
    assert settings.kms.jobs.spool_bucket is not None
    assert (settings.kms.auth.tokens or "").startswith("s3://")
    assert not settings.kms.jobs.roots
    assert [name for name, each in settings.kms.jobs.buckets.items() if each.read or each.write] == []
    for name in ("kms-service", "kms-service-worker"):
        made = workload(documents, name)
        assert not [
            each for each in made["spec"]["template"]["spec"]["volumes"] if "persistentVolumeClaim" in each
        ]
        if made["kind"] == "StatefulSet":
            (claim,) = made["spec"]["volumeClaimTemplates"]
            assert (claim["metadata"]["name"], claim["spec"]["accessModes"]) == ("state", ["ReadWriteOnce"])
            assert set(made["spec"]["persistentVolumeClaimRetentionPolicy"].values()) == {"Retain"}


def test_rules_have_one_source(installs: Installs) -> None:
    written = [
        group
        for path in sorted((ROOT / "monitoring/rules").glob("*.yml"))
        for group in yaml.safe_load(path.read_text())["groups"]
    ]

    assert named(installs["openbao"], "PrometheusRule", "kms-service")["spec"]["groups"] == written


def test_every_dashboard_is_put_into_the_cluster(installs: Installs) -> None:
    boards = named(installs["openbao"], "ConfigMap", "kms-service-dashboards")

    folder = ROOT / "monitoring/grafana/dashboards"
    assert boards["data"] == {path.name: path.read_text() for path in folder.iterdir()}
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_scrapes_are_called_as_the_alerts_call_them(installs: Installs) -> None:
    jobs = {
        relabeling["replacement"]
        for each in installs["openbao"]
        if each["kind"] == "PodMonitor"
        for endpoint in each["spec"]["podMetricsEndpoints"]
        for relabeling in endpoint["relabelings"]
    }
    rules = yaml.safe_dump(named(installs["openbao"], "PrometheusRule", "kms-service"))

    assert jobs == {"kms-api", "kms-worker"}
    assert set(re.findall(r'job=~?\\?"(kms-[a-z]+)\\?"', rules)) <= jobs


def test_workers_are_scaled_by_every_lane_of_the_queues(installs: Installs) -> None:
    scaled = named(installs["openbao"], "ScaledObject", "kms-service-worker")["spec"]
    queries = {trigger["name"]: trigger["metadata"]["query"] for trigger in scaled["triggers"]}

    assert scaled["minReplicaCount"] >= 1, "workers also defer, expire and rotate"
    for gauge in (metrics.QUEUE_DEPTH, metrics.JOBS_IN_STATE):
        (described,) = gauge.describe()
        assert any(described.name in query for query in queries.values())
    lanes = ", ".join(metrics.QUEUE_DEPTH._labelnames)  # noqa: SLF001 -- no public name says them
    assert f"sum(max by ({lanes})" in queries["waiting"]


def test_the_page_on_several_hosts_has_these_thresholds(installs: Installs) -> None:
    page = (ROOT / "docs/hosts.md").read_text()
    scaled = named(installs["openbao"], "ScaledObject", "kms-service-worker")["spec"]

    for trigger in scaled["triggers"]:
        assert f"| `{trigger['name']}`: " in page
        assert f"`threshold` {trigger['metadata']['threshold']} |" in page
    assert f"between {scaled['minReplicaCount']} and {scaled['maxReplicaCount']}:" in page
