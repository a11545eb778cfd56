"""Rate limits by token buckets: failed authentications by source, and requests by tenant.

Each process counts for itself, in bounded memory; of several processes at one port, each allows its share.
"""

import ipaddress
import math
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Final, TypeVar

from kms_core.proxies import address_of
from kms_protocol.errors import RateLimited

T = TypeVar("T")

MOST_SOURCES: Final = 4096
_IPV6_BITS: Final = 64  # the network of one caller, who can use any address in it
DEBT_S: Final = 60.0
"""The highest debt of a tenant, in seconds of its rate."""
_USED_UP: Final = "Your tenant has used up its requests per second, of which each item of a batch is one"
_STEP: Final = 100  # items of a stream that are counted at once
_ENOUGH: Final = 1 - 1e-9  # of one request: a client that waits so long must not fail by a rounding error


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
    """Failed attempts by source, of the 4,096 sources that failed last.

    It also bounds the failures that are logged and recorded: 600 at once, and 10 a second, of all sources.
    """

    def __init__(self, per_minute: float, *, clock: Callable[[], float] = time.monotonic) -> None:
        self._rate = Rate(per_minute / 60, max(1.0, per_minute))
        self._clock = clock
        self._buckets: OrderedDict[str, _Bucket] = OrderedDict()
        self._records = _Bucket(_RECORDS.burst, clock())

    def wait_s(self, address: str) -> float:
        """Seconds until this source may fail again; 0 if it may now."""
        bucket = self._buckets.get(source_of(address))
        return 0.0 if bucket is None else _wait_s(bucket, self._rate, self._clock())

    def failed(self, address: str) -> bool:
        """Count a failure; returns whether to log and record it."""
        source, now = source_of(address), self._clock()
        bucket = self._buckets.pop(source, None) or _Bucket(self._rate.burst, now)
        _take(bucket, self._rate, now)
        self._buckets[source] = bucket
        if len(self._buckets) > MOST_SOURCES:
            self._buckets.popitem(last=False)
        is_room = not _wait_s(self._records, _RECORDS, now)
        if is_room:
            _take(self._records, _RECORDS, now)
        return is_room


class Requests:
    """Requests and their items by tenant, where settings bound them. Safe in several threads.

    A request is allowed while its tenant has one left. Its further items may exceed the rest: the tenant then
    is in debt, and later requests wait. So every batch is possible. A debt is at most ``DEBT_S`` seconds of
    the tenant's rate, so that no request blocks a tenant for longer.
    """

    def __init__(self, rates: Mapping[str, Rate], *, clock: Callable[[], float] = time.monotonic) -> None:
        now = clock()
        self._rates = rates
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets = {tenant: _Bucket(rate.burst, now) for tenant, rate in rates.items()}

    def take(self, tenant: str) -> None:
        """Count a request. Raises RateLimited with the seconds until the next one is allowed."""
        self._spend(tenant, 1, left=_ENOUGH)

    def take_items(self, tenant: str, count: int) -> float:
        """Count the items of a request, of which ``take`` has counted one already.

        Returns the seconds until the next request is allowed, 0 if it is now. Raises RateLimited, and counts
        nothing, while the tenant is in debt: of several batches that were allowed at the same time, one may
        go into debt.
        """
        return self._spend(tenant, count - 1, left=_ENOUGH - 1)

    def counted(self, tenant: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items of a stream, and count each but the first when it is taken, into debt."""
        index, counted = 0, 0
        try:
            for index, item in enumerate(items):
                yield item
                if index - counted >= _STEP:
                    self._spend(tenant, index - counted)
                    counted = index
        finally:
            self._spend(tenant, index - counted)

    def _spend(self, tenant: str, count: int, *, left: float = -math.inf) -> float:
        """Take ``count`` out of a bucket that holds at least ``left``, up to the highest debt.

        Returns the seconds until a request is allowed. Raises RateLimited if the bucket holds less.
        """
        rate = self._rates.get(tenant)
        if rate is None or count < 1:
            return 0.0
        with self._lock:
            bucket, now = self._buckets[tenant], self._clock()
            level = _level(bucket, rate, now)
            if level >= left:
                bucket.level, bucket.at = max(level - count, -DEBT_S * rate.per_s), now
        if level < left:
            raise RateLimited(_USED_UP, retry_after_s=(1 - level) / rate.per_s)
        return _wait_s(bucket, rate, now)


def source_of(address: str) -> str:
    """The source of an address: an IPv4 address or an IPv6 network of 64 bits; other text is kept."""
    found = address_of(address)
    if isinstance(found, ipaddress.IPv6Address):
        return str(ipaddress.ip_network((int(found) >> _IPV6_BITS << _IPV6_BITS, _IPV6_BITS)))
    return str(found or address)


def _wait_s(bucket: _Bucket, rate: Rate, now: float) -> float:
    level = _level(bucket, rate, now)
    return 0.0 if level >= _ENOUGH else (1 - level) / rate.per_s


def _take(bucket: _Bucket, rate: Rate, now: float) -> None:
    bucket.level = max(0.0, _level(bucket, rate, now) - 1)
    bucket.at = now


def _level(bucket: _Bucket, rate: Rate, now: float) -> float:
    """The level of a bucket now; below zero it is in debt."""
    return min(rate.burst, bucket.level + (now - bucket.at) * rate.per_s)
