"""What Prometheus is told: requests, times, and the state of the engine."""

from collections.abc import Callable, Iterator

from prometheus_client import CollectorRegistry, Counter, Histogram
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from predict.engine.engine import EngineStats

PREFIX = "paddle_mixtral"
# Seconds. Mixtral on a processor and on a GPU are far apart.
FIRST_TOKEN_BUCKETS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250)
TOKEN_BUCKETS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5)
REQUEST_BUCKETS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 250, 500, 1000)


class Metrics:
    """The metrics of one server, in a registry of their own.

    Args:
        stats: the engine's latest.
    """

    def __init__(self, stats: Callable[[], EngineStats]):
        self.registry = CollectorRegistry()
        self.registry.register(_EngineCollector(stats))
        self.requests = Counter(
            f"{PREFIX}_http_requests", "HTTP requests answered", ["route", "status"], registry=self.registry
        )
        self.prompt_tokens = Counter(f"{PREFIX}_prompt_tokens", "tokens of prompts", registry=self.registry)
        self.first_token = Histogram(
            f"{PREFIX}_time_to_first_token_seconds",
            "from a request's place in the queue to the first token of an answer",
            buckets=FIRST_TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.token = Histogram(
            f"{PREFIX}_time_per_token_seconds",
            "between the tokens of an answer after the first",
            buckets=TOKEN_BUCKETS,
            registry=self.registry,
        )
        self.request = Histogram(
            f"{PREFIX}_request_seconds",
            "from a request's place in the queue to the end of an answer",
            buckets=REQUEST_BUCKETS,
            registry=self.registry,
        )


class _EngineCollector:
    """Reads the engine's stats when asked."""

    def __init__(self, stats: Callable[[], EngineStats]):
        self._stats = stats

    def collect(self) -> Iterator[Metric]:
        stats = self._stats()
        gauges = {
            "sequences_waiting": ("sequences that wait for their turn", stats.waiting),
            "sequences_running": ("sequences under way", stats.running),
            "kv_cache_blocks": ("blocks of the KV cache", stats.blocks_total),
            "kv_cache_blocks_free": ("blocks without known content", stats.blocks_free),
            "kv_cache_blocks_cached": ("blocks nobody uses whose content may be found again", stats.blocks_cached),
            "kv_cache_usage_ratio": (
                "share of the KV cache's blocks in use",
                1 - (stats.blocks_free + stats.blocks_cached) / stats.blocks_total,
            ),
        }
        counters = {
            "prefix_cache_queried_tokens": ("prompt tokens looked up in the prefix cache", stats.prefix_queried_tokens),
            "prefix_cache_hit_tokens": ("of these, tokens found there", stats.prefix_hit_tokens),
            "preemptions": ("sequences put back to the queue for want of blocks", stats.preemptions),
            "generated_tokens": ("tokens generated", stats.generated_tokens),
        }
        for name, (text, value) in gauges.items():
            yield GaugeMetricFamily(f"{PREFIX}_{name}", text, value=value)
        for name, (text, value) in counters.items():
            yield CounterMetricFamily(f"{PREFIX}_{name}", text, value=value)
