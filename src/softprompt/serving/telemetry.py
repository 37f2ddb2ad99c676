"""What a server says of itself: metrics for Prometheus, under vLLM's names, and a log of JSON lines."""

from __future__ import annotations

import json
import logging
import sys
import time
from collections.abc import Iterator
from datetime import datetime, timezone

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from softprompt.serving.jobs import Backend, Ticket

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 25.0, 50.0, 100.0, 250.0)


class Metrics:
    """Counts what the server does.

    ``model_name`` is the model that a request named, or, for histograms and what concerns the engine as a whole, the
    base model: a histogram for each of a thousand soft prompts would be too many series.
    """

    def __init__(self, engine: Backend, base: str) -> None:
        self._base = base
        self._registry = CollectorRegistry()
        self._registry.register(_State(engine, base))
        self._prompt_tokens = self._counter("prompt_tokens", "Number of prefill tokens, virtual tokens included.")
        self._generated = self._counter("generation_tokens", "Number of generation tokens.")
        self._done = self._counter("request_success", "Count of successfully processed requests.", "finished_reason")
        self._first = self._histogram("time_to_first_token_seconds", "From arrival to the first token or the scores.")
        self._queue = self._histogram("request_queue_time_seconds", "From arrival to the first forward pass.")
        self._whole = self._histogram("e2e_request_latency_seconds", "From arrival to the end.")
        self._each = self._histogram("request_time_per_output_token_seconds", "Between tokens, the mean of a request.")

    def finished(self, ticket: Ticket, count: int, reason: str) -> None:
        """Counts a job that has ended.

        Args:
            ticket: the job.
            count: tokens that it generated.
            reason: ``stop``, ``length``, ``abort``, ``timeout``, ``error``, ``upstream``, or ``scored``.
        """
        now = time.monotonic()
        name = ticket.job.task
        self._done.labels(name, reason).inc()
        self._generated.labels(name).inc(count)
        if ticket.started is not None:
            self._prompt_tokens.labels(name).inc(ticket.job.prompt_tokens)
            self._queue.labels(self._base).observe(ticket.started - ticket.submitted)
        if ticket.first is not None:
            self._first.labels(self._base).observe(ticket.first - ticket.submitted)
            if count > 1 and ticket.job.sampling is not None:  # a label comes all at once
                self._each.labels(self._base).observe((now - ticket.first) / (count - 1))
        self._whole.labels(self._base).observe(now - ticket.submitted)

    def text(self) -> bytes:
        """The metrics in Prometheus' text format."""
        return generate_latest(self._registry)

    def _counter(self, name: str, help: str, *labels: str) -> Counter:
        return Counter(f"softprompt:{name}", help, ["model_name", *labels], registry=self._registry)

    def _histogram(self, name: str, help: str) -> Histogram:
        return Histogram(f"softprompt:{name}", help, ["model_name"], registry=self._registry, buckets=SECONDS)


class _State(Collector):
    """What the engine knows at the moment it is asked."""

    def __init__(self, engine: Backend, base: str) -> None:
        self._engine, self._base = engine, base

    def collect(self) -> Iterator[Metric]:
        engine, prefixes = self._engine, self._engine.prefixes
        gauges = (
            ("num_requests_running", "Number of requests in forward passes.", engine.running),
            ("num_requests_waiting", "Number of requests waiting.", engine.waiting),
            ("prefix_cache_bytes", "Bytes of the prefixes in the cache.", prefixes.nbytes),
        )
        counters = (
            ("prefix_cache_queries", "Prefix cache queries, in tokens.", prefixes.queries),
            ("prefix_cache_hits", "Prefix cache hits, in tokens.", prefixes.hits),
        )
        for kind, values in ((GaugeMetricFamily, gauges), (CounterMetricFamily, counters)):
            for name, help, value in values:
                family = kind(f"softprompt:{name}", help, labels=["model_name"])
                family.add_metric([self._base], value)
                yield family


class JsonLines(logging.Formatter):
    """One JSON object a line: time, level, event, and what ``extra={"fields": …}`` adds."""

    def format(self, record: logging.LogRecord) -> str:
        """The line."""
        line: dict[str, object] = {
            "time": datetime.fromtimestamp(record.created, timezone.utc).isoformat(timespec="milliseconds"),
            "level": record.levelname.lower(),
            "logger": record.name,
            "event": record.getMessage(),
            **getattr(record, "fields", {}),
        }
        if record.exc_info:
            line["error"] = self.formatException(record.exc_info)
        return json.dumps(line, ensure_ascii=False, default=str)


def log_as_json() -> None:
    """Sends every log record of ours and of the HTTP server's to stderr as JSON lines."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JsonLines())
    for name in ("softprompt", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(logging.INFO if name == "softprompt" else logging.WARNING)
