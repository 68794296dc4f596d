"""What `/metrics` tells, by Prometheus' own library."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily

from blockdiff.serving.served import Served

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)


class Metrics:
    """Of one app; the workers are asked when somebody looks."""

    def __init__(self, models: Mapping[str, Served]) -> None:
        self.models, self.registry = models, CollectorRegistry()
        self.requests = Counter(
            "blockdiff_requests", "Requests answered", ["path", "status"], registry=self.registry
        )
        self.seconds = Histogram(
            "blockdiff_request_seconds", "Seconds from a request to the end of its answer",
            ["path"], buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.first = Histogram(
            "blockdiff_time_to_first_block_seconds",
            "Seconds from a request to its first tokens that stay", ["model"],
            buckets=_SECONDS, registry=self.registry,
        )  # fmt: skip
        self.registry.register(self)

    def describe(self) -> list[Any]:
        return []

    def collect(self) -> Iterator[Any]:
        facts = [(name, one.worker.stats()) for name, one in list(self.models.items())]
        gauges = {
            "rows": ("Rows that are being written", lambda s: s.rows),
            "rows_capacity": ("Rows there is room for", lambda s: s.capacity),
            "queue": ("Rows that wait", lambda s: s.queued),
            "tokens_per_evaluation": (
                "New tokens over the rows' own evaluations, since the start",
                lambda s: s.tokens / max(s.row_evaluations, 1),
            ),
        }
        counters = {
            "tokens": ("New tokens of finished rows", lambda s: s.tokens),
            "prompt_tokens": ("Tokens of prompts that were read", lambda s: s.prompt_tokens),
            "cached_tokens": ("Of them those known already", lambda s: s.cached_tokens),
            "evaluations": ("Network evaluations, of all rows at once", lambda s: s.evaluations),
            "row_evaluations": ("Network evaluations of each row", lambda s: s.row_evaluations),
            "rows_finished": ("Rows written to their end", lambda s: s.finished),
            "rows_restarted": ("Rows begun again as an evaluation failed", lambda s: s.restarted),
            "rows_failed": ("Rows that failed", lambda s: s.failed),
            "rows_cancelled": ("Rows whose client went away", lambda s: s.cancelled),
            "busy_seconds": ("Seconds the compute thread worked", lambda s: s.busy),
        }
        for kind, members in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, (text, value) in members.items():
                family = kind(f"blockdiff_{name}", text, labels=["model"])
                for model, stats in facts:
                    family.add_metric([model], float(value(stats)))
                yield family

    def page(self) -> bytes:
        return generate_latest(self.registry)
