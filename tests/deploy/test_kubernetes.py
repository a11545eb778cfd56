"""deploy/kubernetes: built by Kustomize, judged by the schemas, and at one with the service's own words."""

import json
import re
import sys
from pathlib import Path
from typing import Any, Final

import pytest
import yaml

import prometheusrule
from artefacts import KUBERNETES, OVERLAYS, Document, kustomized, passes, run, tool
from kms_core.observability import metrics
from kms_core.settings.load import check_exposure
from kms_core.settings.load import load as load_settings
from kms_core.settings.model import Settings

VERSIONS: Final = ("1.30", "1.37")
"""The oldest that knows every field used here, and the newest."""
CUSTOM: Final = ("keda.sh/", "monitoring.coreos.com/")
RESTRICTED: Final = {
    "allowPrivilegeEscalation": False,
    "readOnlyRootFilesystem": True,
    "capabilities": {"drop": ["ALL"]},
}
Overlays = dict[str, list[Document]]


@pytest.fixture(scope="module")
def overlays(tmp_path_factory: pytest.TempPathFactory) -> Overlays:
    return {name: kustomized(name, tmp_path_factory.mktemp(name)) for name in OVERLAYS}


def named(documents: list[Document], kind: str, name: str) -> Document:
    (found,) = [each for each in documents if each["kind"] == kind and each["metadata"]["name"] == name]
    return found


def pods(documents: list[Document]) -> dict[str, Document]:
    kinds = {"Deployment", "StatefulSet"}
    return {each["metadata"]["name"]: each["spec"]["template"] for each in documents if each["kind"] in kinds}


def each_pod(overlays: Overlays) -> list[tuple[str, Document]]:
    return [(name, pod) for documents in overlays.values() for name, pod in pods(documents).items()]


@pytest.mark.parametrize("version", VERSIONS)
def test_every_object_is_as_the_schema_says(overlays: Overlays, version: str, tmp_path: Path) -> None:
    documents = {json.dumps(document) for made in overlays.values() for document in made}
    files = []
    for number, text in enumerate(sorted(documents)):
        if not json.loads(text)["apiVersion"].startswith(CUSTOM):
            files.append(tmp_path / f"{number}.json")
            files[-1].write_text(text)

    passes(tool("kubernetes-validate"), "-k", version, "--strict", *files)

    assert len(files) > 20


def test_objects_of_operators_are_as_their_models_say_and_nothing_is_unknown(overlays: Overlays) -> None:
    kinds = ["PrometheusRule", "ScaledObject", "ServiceMonitor"]
    ours = [document for document in overlays["production"] if document["kind"] in kinds]
    misspelt = json.loads(json.dumps(named(ours, "ServiceMonitor", "kms-api")))
    misspelt["spec"]["endpoints"][0]["relabellings"] = []
    judge = Path(__file__).with_name("custom_resources.py")

    judged = run(sys.executable, "-W", "ignore", judge, input=yaml.safe_dump_all([*ours, misspelt]))

    assert sorted(judged.stdout.split()) == [*kinds, "ServiceMonitor", "ServiceMonitor"], judged.stderr
    assert judged.stderr == "unknown: ServiceMonitor.spec.endpoints[0].relabellings\n"


# -- names and what is promised ------------------------------------------------------------------------------


def test_names_are_those_that_were_documented(overlays: Overlays) -> None:
    api = named(overlays["production"], "Deployment", "kms-service")["spec"]["template"]["spec"]
    container = api["containers"][0]

    assert container["name"] == "kms-service"
    assert re.fullmatch(r"provisioning/kms-service:\d+\.\d+\.\d+", container["image"])
    assert container["ports"] == [{"name": "http", "containerPort": 8082}]
    assert {each["name"]: each["value"] for each in container["env"]} == {
        "PROVISIONING_ENV": "prod",
        "COSMIAN_KMS_URL": "https://kms.example.com",
    }
    (secret,) = [each["secret"] for each in api["volumes"] if each["name"] == "cosmian-api-key"]
    assert secret["secretName"] == "cosmian-api-key"
    assert [each["key"] for each in secret["items"]] == ["api-key"]
    assert named(overlays["production"], "HorizontalPodAutoscaler", "kms-service")["spec"]["minReplicas"] == 2


def test_a_pod_may_do_no_more_than_it_must(overlays: Overlays) -> None:
    for name, pod in each_pod(overlays):
        spec = pod["spec"]
        assert spec["automountServiceAccountToken"] is False, name
        assert spec["enableServiceLinks"] is False, name
        assert spec["securityContext"]["runAsNonRoot"] is True, name
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}, name
        for container in spec["containers"]:
            assert container["securityContext"] == RESTRICTED, name
            assert container["resources"].keys() == {"requests", "limits"}, name
            assert {"startupProbe", "livenessProbe", "readinessProbe"} <= container.keys(), name


def test_a_probe_asks_a_port_that_there_is_and_no_backend(overlays: Overlays) -> None:
    for name, pod in each_pod(overlays):
        (container,) = pod["spec"]["containers"]
        ports = {port["name"] for port in container["ports"]}
        for kind in ("startupProbe", "livenessProbe", "readinessProbe"):
            asked = container[kind].get("httpGet") or container[kind].get("tcpSocket") or {"port": None}
            assert asked["port"] in {*ports, None}, name
            assert asked.get("path") in {"/livez", None}, name


def test_what_is_mounted_is_a_volume_and_each_volume_is_mounted(overlays: Overlays) -> None:
    for name, pod in each_pod(overlays):
        mounted = {mount["name"] for mount in pod["spec"]["containers"][0]["volumeMounts"]}
        assert mounted - {"data"} == {volume["name"] for volume in pod["spec"]["volumes"]}, name


def test_no_replicas_are_set_where_a_scaler_sets_them(overlays: Overlays) -> None:
    documents = overlays["production"]
    scaled = {
        each["spec"]["scaleTargetRef"]["name"]
        for each in documents
        if each["kind"] in {"HorizontalPodAutoscaler", "ScaledObject"}
    }

    assert scaled == {"kms-service", "kms-worker"}
    assert not [name for name in scaled if "replicas" in named(documents, "Deployment", name)["spec"]]
    assert named(overlays["trial"], "Deployment", "kms-worker")["spec"]["replicas"] == 2


def test_a_selector_finds_the_pods_that_it_means(overlays: Overlays) -> None:
    for documents in overlays.values():
        labels = {
            name: pod["metadata"]["labels"]["app.kubernetes.io/name"] for name, pod in pods(documents).items()
        }
        assert {name: name for name in labels} == labels
        for kind in ("Service", "PodDisruptionBudget"):
            for each in (document for document in documents if document["kind"] == kind):
                selector = each["spec"]["selector"]
                chosen = selector.get("matchLabels", selector)["app.kubernetes.io/name"]
                assert chosen == each["metadata"]["name"]
                assert chosen in labels


def test_nothing_may_pass_that_no_policy_names(overlays: Overlays) -> None:
    for documents in overlays.values():
        closed = named(documents, "NetworkPolicy", "deny-all")["spec"]
        assert closed == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
        egress = named(documents, "NetworkPolicy", "kms-egress")["spec"]["egress"]
        blocks = [to["ipBlock"] for rule in egress for to in rule["to"] if "ipBlock" in to]
        assert "169.254.0.0/16" in blocks[0]["except"], "where the cloud hands out the node's credentials"


# -- at one with the service ---------------------------------------------------------------------------------


def settings_of(documents: list[Document], folder: Path) -> Settings:
    """What the API reads: its variables, and the file of the ConfigMap that it mounts."""
    spec = named(documents, "Deployment", "kms-service")["spec"]["template"]["spec"]
    (volume,) = [each["configMap"]["name"] for each in spec["volumes"] if "configMap" in each]
    (folder / "kms.toml").write_text(named(documents, "ConfigMap", volume)["data"]["kms.toml"])
    environ = {each["name"]: each["value"] for each in spec["containers"][0]["env"]}
    loaded = load_settings(folder / "kms.toml", environ)
    check_exposure(loaded)
    return loaded


def secret_files(documents: list[Document]) -> set[str]:
    """Every file that the API's pod has from a Secret that is known here, or that the base describes."""
    spec = named(documents, "Deployment", "kms-service")["spec"]["template"]["spec"]
    places = {mount["name"]: mount["mountPath"] for mount in spec["containers"][0]["volumeMounts"]}
    made = {each["metadata"]["name"]: each["data"] for each in documents if each["kind"] == "Secret"}
    described = {"kms-service-keys": ("spool.key", "intake.key"), "kms-service-redis": ("password",)}
    found = set()
    for volume in spec["volumes"]:
        if "secret" in volume:
            assert volume["secret"]["defaultMode"] == 0o440, "others than the pod's group may read it"
            name = volume["secret"]["secretName"]
            items = [item["path"] for item in volume["secret"].get("items", ())]
            found |= {
                f"{places[volume['name']]}/{file}" for file in items or made.get(name) or described[name]
            }
    return found


@pytest.mark.parametrize("overlay", OVERLAYS)
def test_the_service_finds_each_secret_where_its_settings_say(
    overlays: Overlays, overlay: str, tmp_path: Path
) -> None:
    kms = settings_of(overlays[overlay], tmp_path).kms
    wanted: dict[str, list[Any]] = {
        "production": [kms.cosmian.api_key_file],
        "trial": [kms.age.private_key_path, kms.age.public_key_path],
    }
    common = [kms.redis.password_file, kms.jobs.spool_identity_path, kms.jobs.intake_identity_path]

    assert {str(path) for path in (*wanted[overlay], *common)} == secret_files(overlays[overlay])
    assert kms.auth.mode == "required"


def test_rules_have_one_source() -> None:
    written = (KUBERNETES / "components/monitoring/prometheusrule.yaml").read_text()

    assert written == prometheusrule.render(), "run: python monitoring/prometheusrule.py"


def test_every_dashboard_is_put_into_the_cluster(overlays: Overlays) -> None:
    boards = named(overlays["production"], "ConfigMap", "kms-dashboards")

    folder = KUBERNETES.parents[1] / "monitoring/grafana/dashboards"
    assert boards["data"].keys() == {path.name for path in folder.iterdir()}
    assert boards["metadata"]["labels"]["grafana_dashboard"] == "1"


def test_scrapes_are_called_as_the_alerts_call_them(overlays: Overlays) -> None:
    jobs = {
        relabeling["replacement"]
        for each in overlays["production"]
        if each["kind"] == "ServiceMonitor"
        for endpoint in each["spec"]["endpoints"]
        for relabeling in endpoint["relabelings"]
    }
    rules = yaml.safe_dump(named(overlays["production"], "PrometheusRule", "kms-service"))

    assert jobs == {"kms-api", "kms-worker"}
    assert set(re.findall(r'job=~?\\?"(kms-[a-z]+)\\?"', rules)) <= jobs


def test_workers_are_scaled_by_every_lane_of_the_queues(overlays: Overlays) -> None:
    scaled = named(overlays["production"], "ScaledObject", "kms-worker")["spec"]
    queries = {trigger["name"]: trigger["metadata"]["query"] for trigger in scaled["triggers"]}

    assert scaled["minReplicaCount"] >= 1, "workers also defer, expire and rotate"
    for gauge in (metrics.QUEUE_DEPTH, metrics.JOBS_IN_STATE):
        (described,) = gauge.describe()
        assert any(described.name in query for query in queries.values())
    lanes = ", ".join(metrics.QUEUE_DEPTH._labelnames)  # noqa: SLF001 -- no public name says them
    assert f"sum(max by ({lanes})" in queries["waiting"]
