"""Shows among the metrics of an API process what only tests look at: held budgets, and verified signatures.

The API of a ``Service`` imports it first where ``is_open_inside`` is set.
"""

from collections.abc import Iterator
from typing import Any, Final
from unittest.mock import patch

from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kms_api.transport.admission import Admission
from kms_core.auth import jwt_verifier
from kms_core.settings.model import ServerSection

_BUDGETS: Final = ("json", "uploads", "downloads", "streams", "logins")
_SIGNATURES: Final = Counter("test_jwt_signatures", "JWTs whose signature was verified")
_admission_of = Admission.of
_decoded = jwt_verifier._decoded  # noqa: SLF001 -- nothing else tells


class _Held(Collector):
    def __init__(self, admission: Admission) -> None:
        self._admission = admission

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily("test_budget_held", "What requests hold of a budget", labels=["budget"])
        for name in _BUDGETS:
            held.add_metric([name], getattr(self._admission, name).held)
        yield held


def _shown(server: ServerSection) -> Admission:
    made = _admission_of(server)
    REGISTRY.register(_Held(made))
    return made


def _counted(*args: Any) -> Any:  # noqa: ANN401 -- those of ``_decoded``
    _SIGNATURES.inc()
    return _decoded(*args)


patch.object(Admission, "of", _shown).start()
patch.object(jwt_verifier, "_decoded", _counted).start()
