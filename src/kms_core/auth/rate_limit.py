"""How often something may happen: token buckets, for failures by source and for requests by tenant.

Each process counts for itself, in bounded memory; of several that share an address, each allows its share.
"""

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from kms_core.observability import metrics
from kms_protocol.errors import RateLimited

T = TypeVar("T")

MOST_SOURCES: Final = 4096
_IPV6_BITS: Final = 64  # what one caller is given: addresses within cost him nothing
DEBT_S: Final = 60.0
"""How many seconds of its pace a tenant owes at most."""
_STEP: Final = 100  # items of a stream that are counted at once
_ENOUGH: Final = 1 - 1e-9  # of one request: who waits as long as told must not miss it by a rounding


@dataclass(slots=True)
class _Bucket:
    level: float
    at: float


@dataclass(frozen=True, slots=True)
class Rate:
    """``burst`` at once, and ``per_s`` in the long run."""

    per_s: float
    burst: float


_RECORDS: Final = Rate(10.0, 600.0)


class Failures:
    """Failed attempts by source. The sources that failed last are remembered, at most 4,096 of them.

    Says, too, which failures to log and record: of all sources together 600 at once, and 10 a second.
    """

    def __init__(
        self, per_minute: float, *, clock: Callable[[], float] = time.monotonic, most: int = MOST_SOURCES
    ) -> None:
        self._pace = Rate(per_minute / 60, max(1.0, per_minute))
        self._clock = clock
        self._most = most
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._records = _Bucket(_RECORDS.burst, clock())

    def wait_s(self, address: str) -> float:
        """Seconds until this source may fail again; 0 if it may now."""
        bucket = self._buckets.get(source_of(address))
        return 0.0 if bucket is None else _wait_s(bucket, self._pace, self._clock())

    def failed(self, address: str) -> bool:
        """Count a failure. Whether it is to be logged and recorded."""
        source, now = source_of(address), self._clock()
        bucket = self._buckets.pop(source, None) or _Bucket(self._pace.burst, now)
        _take(bucket, self._pace, now)
        self._buckets[source] = bucket
        if len(self._buckets) > self._most:
            self._buckets.popitem(last=False)
        is_room = not _wait_s(self._records, _RECORDS, now)
        if is_room:
            _take(self._records, _RECORDS, now)
        return is_room


class Requests:
    """Requests and their items by tenant, where settings bound them. Safe to call from several threads.

    A request is let in while its tenant has one left. Further items of it may be more than are left: the
    tenant is then in debt, which later requests wait for. So any batch can pass. A debt never exceeds
    ``DEBT_S`` seconds of the tenant's pace, so that no request shuts a tenant out for longer.
    """

    def __init__(self, paces: Mapping[str, Rate], *, clock: Callable[[], float] = time.monotonic) -> None:
        now = clock()
        self._paces = paces
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets = {tenant: _Bucket(pace.burst, now) for tenant, pace in paces.items()}

    def take(self, tenant: str) -> None:
        """Count a request. Raises RateLimited, with the seconds until the next one is allowed."""
        self._spend(tenant, 1, left=_ENOUGH)

    def take_items(self, tenant: str, count: int) -> None:
        """Count the items of a request, of which ``take`` has counted one already.

        Raises RateLimited, and counts nothing, while the tenant is in debt: of several batches that were let
        in together, one may go into debt.
        """
        self._spend(tenant, count - 1, left=_ENOUGH - 1)

    def counted(self, tenant: str, items: Iterable[T]) -> Iterator[T]:
        """The items of a stream, as they are; each but the first is counted when it is taken, into debt."""
        index, told = 0, 0
        try:
            for index, item in enumerate(items):
                yield item
                if index - told >= _STEP:
                    self._spend(tenant, index - told)
                    told = index
        finally:
            self._spend(tenant, index - told)

    def _spend(self, tenant: str, count: int, *, left: float = -math.inf) -> None:
        """Take so many, or as many as may be owed, out of a bucket that holds at least ``left``.

        Raises RateLimited if it holds less.
        """
        pace = self._paces.get(tenant)
        if pace is None or count < 1:
            return
        with self._lock:
            bucket, now = self._buckets[tenant], self._clock()
            level = _level(bucket, pace, now)
            if level >= left:
                bucket.level, bucket.at = max(level - count, -DEBT_S * pace.per_s), now
        if level < left:
            metrics.RATE_LIMITED.labels(tenant).inc()
            wait_s = (1 - level) / pace.per_s
            raise RateLimited("Your tenant's requests a second are used up", retry_after_s=wait_s)


def source_of(address: str) -> str:
    """What counts as one source: an IPv4 address, an IPv6 network of 64 bits; other texts as they are."""
    try:
        found = ipaddress.ip_address(address.partition("%")[0])
    except ValueError:
        return address
    if isinstance(found, ipaddress.IPv6Address):
        if found.ipv4_mapped:
            return str(found.ipv4_mapped)
        return str(ipaddress.ip_network((int(found) >> _IPV6_BITS << _IPV6_BITS, _IPV6_BITS)))
    return str(found)


def _wait_s(bucket: _Bucket, pace: Rate, now: float) -> float:
    level = _level(bucket, pace, now)
    return 0.0 if level >= _ENOUGH else (1 - level) / pace.per_s


def _take(bucket: _Bucket, pace: Rate, now: float) -> None:
    bucket.level = max(0.0, _level(bucket, pace, now) - 1)
    bucket.at = now


def _level(bucket: _Bucket, pace: Rate, now: float) -> float:
    """The level of a bucket now; below zero it is in debt."""
    return min(pace.burst, bucket.level + (now - bucket.at) * pace.per_s)
