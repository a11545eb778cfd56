"""Judges resources of KEDA and of the Prometheus operator: ``python custom_resources.py < manifest.yaml``.

What is unknown to a model is a fault. A program of its own, since the models take seconds to import.
"""

import sys
from collections.abc import Iterator

import yaml
from cloudcoil.models.keda.v1alpha1 import ScaledObject
from cloudcoil.models.prometheus_operator.v1 import PodMonitor, PrometheusRule

MODELS = {model.__name__: model for model in (ScaledObject, PrometheusRule, PodMonitor)}


def lost(given: object, kept: object, where: str) -> Iterator[str]:
    """Paths of what a model did not take over."""
    if isinstance(given, dict) and isinstance(kept, dict):
        for name, value in given.items():
            if name not in kept:
                yield f"{where}.{name}"
            else:
                yield from lost(value, kept[name], f"{where}.{name}")
    elif isinstance(given, list) and isinstance(kept, list):
        for index, (one, other) in enumerate(zip(given, kept, strict=True)):
            yield from lost(one, other, f"{where}[{index}]")


def main() -> int:
    """0, or 1 with the paths of what is unknown on stderr. Raises what pydantic raises on wrong types."""
    faults: list[str] = []
    for document in yaml.safe_load_all(sys.stdin):
        if document["kind"] in MODELS:
            model = MODELS[document["kind"]].model_validate(document)
            kept = model.model_dump(mode="json", by_alias=True, exclude_unset=True)
            faults += lost(document, kept, document["kind"])
            sys.stdout.write(f"{document['kind']}\n")
    sys.stderr.writelines(f"unknown: {fault}\n" for fault in faults)
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
