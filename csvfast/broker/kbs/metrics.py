"""Counters and latencies in Prometheus' text form.

Labels are names out of the program: door, action, outcome. Nothing that came over a wire becomes a label, so a table's size is
bounded and no identity or path leaks into a monitoring system.

    csvfast_requests_total{door,action,outcome}
    csvfast_request_seconds_bucket{door,action,le}, _sum, _count
    csvfast_connections{door}, csvfast_connections_refused_total{door,reason}

Source: prometheus.io/docs/instrumenting/exposition_formats (text format 0.0.4). Thread-safe: each update is a few steps under the
interpreter's lock, and a lost one is a count, not a decision.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable
from typing import Final

__all__ = ["BUCKETS", "Metrics"]

BUCKETS: Final = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
"""Upper limits of the histogram, seconds."""

_CONTENT_TYPE: Final = b"text/plain; version=0.0.4; charset=utf-8"


class _Histogram:
    __slots__ = ("counts", "total")

    def __init__(self) -> None:
        self.counts = [0] * (len(BUCKETS) + 1)
        self.total = 0.0


class Metrics:
    """What a process has done since it was started."""

    content_type: Final = _CONTENT_TYPE

    def __init__(self) -> None:
        self._requests: dict[tuple[str, str, str], int] = {}
        self._seconds: dict[tuple[str, str], _Histogram] = {}
        self._refused: dict[tuple[str, str], int] = {}
        self._gauges: dict[str, Callable[[], int]] = {}

    def request(self, door: str, action: str, outcome: str, seconds: float) -> None:
        """Counts a request. In: outcome   "allowed", "denied", "limited", "unavailable", "malformed" or "failed"."""
        requests, key = self._requests, (door, action, outcome)
        requests[key] = requests.get(key, 0) + 1
        place = (door, action)
        histogram = self._seconds.get(place)
        if histogram is None:
            histogram = self._seconds.setdefault(place, _Histogram())
        histogram.counts[bisect_left(BUCKETS, seconds)] += 1
        histogram.total += seconds

    def refused(self, door: str, reason: str) -> None:
        """Counts a connection that was closed before it made a request. In: reason   a word out of the program."""
        key = (door, reason)
        self._refused[key] = self._refused.get(key, 0) + 1

    def watch_connections(self, door: str, count: Callable[[], int]) -> None:
        """Shows how many connections a door has."""
        self._gauges[door] = count

    def render(self) -> bytes:
        """The page."""
        lines = ["# HELP csvfast_requests_total Requests by door, action and outcome.", "# TYPE csvfast_requests_total counter"]
        for (door, action, outcome), count in sorted(self._requests.items()):
            lines.append(f'csvfast_requests_total{{door="{door}",action="{action}",outcome="{outcome}"}} {count}')
        lines += ["# HELP csvfast_request_seconds Time to answer.", "# TYPE csvfast_request_seconds histogram"]
        for (door, action), histogram in sorted(self._seconds.items()):
            labels, below = f'door="{door}",action="{action}"', 0
            for limit, count in zip((*BUCKETS, "+Inf"), list(histogram.counts), strict=True):
                below += count
                lines.append(f'csvfast_request_seconds_bucket{{{labels},le="{limit}"}} {below}')
            lines.append(f"csvfast_request_seconds_sum{{{labels}}} {histogram.total:.6f}")
            lines.append(f"csvfast_request_seconds_count{{{labels}}} {below}")
        lines += ["# HELP csvfast_connections Open connections.", "# TYPE csvfast_connections gauge"]
        lines += [f'csvfast_connections{{door="{door}"}} {count()}' for door, count in sorted(self._gauges.items())]
        lines += ["# HELP csvfast_connections_refused_total Connections closed before a request."]
        lines += ["# TYPE csvfast_connections_refused_total counter"]
        for (door, reason), count in sorted(self._refused.items()):
            lines.append(f'csvfast_connections_refused_total{{door="{door}",reason="{reason}"}} {count}')
        return ("\n".join(lines) + "\n").encode()
