"""Writes prometheusrule.yaml of deploy/kubernetes from monitoring/rules, which stays the one source."""

from pathlib import Path
from typing import Final

import yaml

ROOT: Final = Path(__file__).parents[1]
RULES: Final = ROOT / "monitoring/rules"
TARGET: Final = ROOT / "deploy/kubernetes/components/monitoring/prometheusrule.yaml"
HEAD: Final = "# Written by monitoring/prometheusrule.py from monitoring/rules; change those.\n"


def render() -> str:
    """The manifest, with every group of every rule file."""
    groups = [
        group for path in sorted(RULES.glob("*.yml")) for group in yaml.safe_load(path.read_text())["groups"]
    ]
    rule = {
        "apiVersion": "monitoring.coreos.com/v1",
        "kind": "PrometheusRule",
        "metadata": {"name": "kms-service", "labels": {"app.kubernetes.io/name": "kms-service"}},
        "spec": {"groups": groups},
    }
    return HEAD + yaml.safe_dump(rule, sort_keys=False, allow_unicode=True, width=110)


if __name__ == "__main__":
    TARGET.write_text(render())
