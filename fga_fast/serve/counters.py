"""What the service counts, for Prometheus."""

from __future__ import annotations

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

_SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0, 30.0)
STAGES = ("decode", "queue", "explain", "pack", "total")


class Counters:
    """The metrics of one service, in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.requests = Counter(
            "fga_fast_requests", "Answers by kind (http, frame) and outcome: ok, or the code of the error",
            ["kind", "outcome"], registry=self.registry,
        )  # fmt: skip
        self.dropped = Counter("fga_fast_dropped_frames", "Frames of streams that newer ones replaced",
                               registry=self.registry)  # fmt: skip
        self.failures = Counter("fga_fast_internal_errors", "Requests that failed by no fault of theirs",
                                registry=self.registry)  # fmt: skip
        self.batch = Histogram(
            "fga_fast_batch_size", "Requests in a batch", registry=self.registry, buckets=(1, 2, 4, 8, 16, 32, 64, 128)
        )
        self.seconds = Histogram(
            "fga_fast_seconds", "Time by stage, for quantiles", ["stage"], registry=self.registry, buckets=_SECONDS
        )
        self.queue = Gauge("fga_fast_queue_length", "Requests that wait to be explained", registry=self.registry)
        self.inside = Gauge("fga_fast_requests_inside", "Requests being decoded, waiting or explained",
                            registry=self.registry)  # fmt: skip
        self.streams = Gauge("fga_fast_streams", "Open streams", registry=self.registry)
        self.ready = Gauge("fga_fast_ready", "1 if the service takes requests", registry=self.registry)
        for stage in STAGES:
            self.seconds.labels(stage)

    def answered(self, kind: str, milliseconds: dict[str, float]) -> None:
        """Counts an answer and its stages."""
        self.requests.labels(kind, "ok").inc()
        for stage, value in milliseconds.items():
            self.seconds.labels(stage).observe(value / 1000)

    def refused(self, kind: str, code: str) -> None:
        """Counts an error."""
        self.requests.labels(kind, code).inc()
        if code == "internal":
            self.failures.inc()

    def text(self) -> bytes:
        """All of it in Prometheus's text format."""
        return generate_latest(self.registry)
