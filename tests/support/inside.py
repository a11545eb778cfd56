"""Shows among the metrics of an API process what only tests look at: held budgets, and verified signatures.

The API of a ``Service`` imports it first where ``has_test_metrics`` is set.
"""

from collections.abc import Iterator, Mapping
from typing import Any, Final
from unittest.mock import patch

from prometheus_client import REGISTRY, Counter, Metric
from prometheus_client.core import GaugeMetricFamily
from prometheus_client.registry import Collector

from kms_api.transport import admission
from kms_api.transport.admission import Budget, Kind
from kms_core.auth import jwt_verifier
from kms_core.settings.model import ServerSection

_SIGNATURES: Final = Counter("test_jwt_signatures", "JWTs whose signature was verified")
_budgets_of = admission.budgets_of
_decoded = jwt_verifier._decoded  # noqa: SLF001 -- nothing else tells


class _Held(Collector):
    def __init__(self, budgets: Mapping[Kind, Budget]) -> None:
        self._budgets = budgets

    def collect(self) -> Iterator[Metric]:
        held = GaugeMetricFamily("test_budget_held", "What requests hold of a budget", labels=["budget"])
        for name, budget in self._budgets.items():
            held.add_metric([name], budget.held)
        yield held


def _shown(server: ServerSection) -> dict[Kind, Budget]:
    made = _budgets_of(server)
    REGISTRY.register(_Held(made))
    return made


def _counted(*args: Any) -> Any:  # noqa: ANN401 -- those of ``_decoded``
    _SIGNATURES.inc()
    return _decoded(*args)


patch.object(admission, "budgets_of", _shown).start()
patch.object(jwt_verifier, "_decoded", _counted).start()
