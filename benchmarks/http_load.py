"""Sends one request again and again over some connections: by wrk, or without it by asyncio here.

Either gives requests a second, the median and the 99th percentile of latency. Raises RuntimeError unless
every answer was 200.
"""

import asyncio
import shutil
import statistics
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Final
from urllib.parse import urlsplit

from benchmarks.measure import Reading, say

CLIENT: Final = "wrk" if shutil.which("wrk") else "asyncio"
_HEADERS: Final = {"Content-Type": "application/json"}
_SCRIPT: Final = """
wrk.method = "{method}"
wrk.headers["Content-Type"] = "application/json"
local bodies = { {bodies} }
local sent = 0
function request()
    sent = sent % #bodies + 1
    return wrk.format(nil, nil, nil, bodies[sent])
end
function done(summary, latency, requests)
    local errors = summary.errors
    io.write(string.format("RESULT %f %f %f %d %d\\n", summary.requests / summary.duration * 1e6,
        latency:percentile(50), latency:percentile(99),
        errors.status + errors.connect + errors.read + errors.write + errors.timeout, summary.requests))
end
"""


@dataclass(frozen=True, slots=True)
class Shot:
    """A request to repeat; with ``more`` bodies wrk sends them in turn, the client here the first."""

    url: str
    body: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    method: str = "POST"
    more: Sequence[str] = ()


def load(shot: Shot, connections: int, seconds: float) -> Reading:
    """``rate`` in requests a second, ``p50_s`` and ``p99_s``, and how many ``requests`` were made."""
    if CLIENT == "wrk":
        return _wrk(shot, connections, seconds)
    return asyncio.run(_asyncio(shot, connections, seconds))


def warn_without_wrk() -> None:
    if CLIENT != "wrk":
        say("wrk is NOT INSTALLED: the client here is slower and takes part of the server's processor time")


def _wrk(shot: Shot, connections: int, seconds: float) -> Reading:
    with tempfile.NamedTemporaryFile("w", suffix=".lua", prefix="kms-bench-") as script:
        bodies = ", ".join(f"[==[{body}]==]" for body in (shot.body, *shot.more))
        script.write(_SCRIPT.replace("{method}", shot.method).replace("{bodies}", bodies))
        script.writelines(f'wrk.headers["{name}"] = "{value}"\n' for name, value in shot.headers.items())
        script.flush()
        options = ["-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "-s", script.name]
        ran = subprocess.run(["wrk", *options, shot.url], capture_output=True, text=True, check=True)
    line = next((line for line in ran.stdout.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk printed no result: {ran.stdout[-200:]}")
    rate, p50, p99, errors, requests = map(float, line.split()[1:])
    if errors:
        raise RuntimeError(f"{errors:.0f} requests failed")
    if not requests:
        raise RuntimeError(f"no answer within {seconds:g} s")
    return {"rate": rate, "p50_s": p50 / 1e6, "p99_s": p99 / 1e6, "requests": requests}


async def _asyncio(shot: Shot, connections: int, seconds: float) -> Reading:
    started = time.perf_counter()
    times = await asyncio.gather(*(_connection(shot, started + seconds) for _ in range(connections)))
    took = sorted(each for some in times for each in some)
    spent = time.perf_counter() - started
    cut = statistics.quantiles(took, n=100)
    return {"rate": len(took) / spent, "p50_s": cut[49], "p99_s": cut[98], "requests": float(len(took))}


async def _connection(shot: Shot, ends: float) -> list[float]:
    """One kept-alive connection; answers need a Content-Length."""
    parts, body = urlsplit(shot.url), shot.body.encode()
    head = [f"{shot.method} {parts.path} HTTP/1.1", f"Host: {parts.netloc}", f"Content-Length: {len(body)}"]
    head += [f"{name}: {value}" for name, value in {**_HEADERS, **shot.headers}.items()]
    request = "\r\n".join([*head, "", ""]).encode() + body
    reader, writer = await asyncio.open_connection(parts.hostname, parts.port)
    times = []
    while (before := time.perf_counter()) < ends:
        writer.write(request)
        answer = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in answer[:16]:
            raise RuntimeError(f"not 200: {answer[:80]!r}")
        await reader.readexactly(int(answer.partition(b"content-length:")[2].split(b"\r\n")[0]))
        times.append(time.perf_counter() - before)
    writer.close()
    await writer.wait_closed()
    return times
