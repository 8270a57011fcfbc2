"""What is counted, in the text that Prometheus reads.

Source:
    Prometheus' documentation, "Exposition formats", version 0.0.4.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 60.0, 150.0)
"""Upper ends of the histograms' buckets."""


class Histogram:
    """How long something took, by buckets."""

    def __init__(self) -> None:
        self._buckets = [0] * (len(SECONDS) + 1)
        self._sum = 0.0

    def add(self, seconds: float) -> None:
        self._buckets[sum(seconds > end for end in SECONDS)] += 1
        self._sum += seconds

    def lines(self, name: str) -> Iterable[str]:
        """The samples, each bucket with all below it."""
        count = 0
        for end, number in zip((*map(str, SECONDS), "+Inf"), self._buckets, strict=True):
            count += number
            yield f'{name}_bucket{{le="{end}"}} {count}'
        yield f"{name}_sum {self._sum:.6f}"
        yield f"{name}_count {count}"


class Counts:
    """Of one server. Labels come from a few known words, so that nobody can make them grow."""

    def __init__(self) -> None:
        self.requests: Counter[tuple[str, int]] = Counter()
        """By path and status; 499 is a client that left."""
        self.tokens: Counter[str] = Counter()
        """By what they are: prompt, kept, answer, and each kind of medium."""
        self.lost: Counter[str] = Counter()
        """Workers, by how they were lost."""
        self.full = 0
        self.first_s = Histogram()
        self.request_s = Histogram()

    def text(self, gauges: Mapping[str, int]) -> str:
        """All of it.

        Args:
            gauges: What is so just now.
        """
        parts = [
            _counter(
                "avlm_requests_total",
                "Requests by path and status.",
                [({"path": path, "status": str(status)}, n) for (path, status), n in sorted(self.requests.items())],
            ),
            _counter(
                "avlm_tokens_total",
                "Tokens read (prompt; of these kept from before, and of media) and answered.",
                [({"kind": kind}, n) for kind, n in sorted(self.tokens.items())],
            ),
            _counter(
                "avlm_workers_lost_total",
                "Worker processes that had to be ended or died.",
                [({"how": how}, n) for how, n in sorted(self.lost.items())],
            ),
            _counter("avlm_sent_away_total", "Requests for which there was no place.", [({}, self.full)]),
            *(_family(f"avlm_{name}", "gauge", f"{name} now.", [f"avlm_{name} {n}"]) for name, n in gauges.items()),
            _family(
                "avlm_first_token_seconds",
                "histogram",
                "From the question read to the first of its answer.",
                self.first_s.lines("avlm_first_token_seconds"),
            ),
            _family(
                "avlm_request_seconds",
                "histogram",
                "From a request's first byte to its last.",
                self.request_s.lines("avlm_request_seconds"),
            ),
        ]
        return "".join(parts)


def _counter(name: str, help: str, values: Iterable[tuple[Mapping[str, str], int]]) -> str:
    return _family(name, "counter", help, [f"{name}{_labels(labels)} {value}" for labels, value in values])


def _family(name: str, kind: str, help: str, lines: Iterable[str]) -> str:
    return "\n".join([f"# HELP {name} {help}", f"# TYPE {name} {kind}", *lines, ""])


def _labels(labels: Mapping[str, str]) -> str:
    inner = ",".join(f'{key}="{_escaped(value)}"' for key, value in labels.items())
    return f"{{{inner}}}" if inner else ""


def _escaped(value: str) -> str:
    return value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
