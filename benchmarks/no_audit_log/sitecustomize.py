"""An audit log that keeps nothing, in every Python that starts with this folder on its path.

No setting allows that: it is the floor of a benchmark, and nothing else should run with it. The log is
changed when the service loads it: it declares metrics, which a process may do only after
``multiprocess_metrics.share``.
"""

import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType


class _Finder(MetaPathFinder):
    """Finds the module of the log, once."""

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if name != "kms_core.audit.log":
            return None
        sys.meta_path.remove(self)
        found = PathFinder.find_spec(name, path, target)
        if found is None or found.loader is None:
            raise RuntimeError("there is no audit log to replace")
        load = found.loader.exec_module

        def run(module: ModuleType) -> None:
            load(module)
            module.AuditLog.append = lambda *_: ""

        found.loader.exec_module = run  # type: ignore[method-assign]  # of this module alone
        return found


sys.meta_path.insert(0, _Finder())
