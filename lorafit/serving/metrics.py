"""Figures of a server for Prometheus, by vLLM's names under `lorafit:`."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, Counter, Histogram, disable_created_metrics, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

if TYPE_CHECKING:
    from lorafit.answering.batched import BatchedEngine

_FIRST_TOKEN_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60)
_ANSWER_SECONDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 20, 30, 60, 120, 300, 600)
_TOKENS = (1, 4, 16, 32, 64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)
_REFUSALS = (
    "i'm sorry",
    "i am sorry",
    "sorry,",
    "i apologize",
    "i cannot",
    "i can't",
    "i can not",
    "i won't",
    "i'm unable",
    "i am unable",
    "i'm not able",
    "i am not able",
    "unfortunately, i",
    "as an ai",
)
"""How answers begin that decline, in English; docs/serve.md lists them too."""
_THOUGHT_ENDS = "</think>"
_LABELS = ("model_name", "adapter")
_REASONS = {"stop": "stop", "length": "length", "cancelled": "abort", "error": "error"}
"""Ends of the engine's answers, in vLLM's words."""


def declines(text: str) -> bool:
    """Whether an answer, behind what was thought aloud, begins as one does that declines."""
    return text.rpartition(_THOUGHT_ENDS)[2].lstrip().lower().replace("’", "'").startswith(_REFUSALS)


class Metrics:
    """What one server has done. The label `adapter` is empty for the base alone.

    Args:
        engine: Counts requests and tokens.
        model_name: What the base is called.
    """

    def __init__(self, engine: BatchedEngine, model_name: str) -> None:
        self._engine, self._model_name, self._registry = engine, model_name, CollectorRegistry()
        self._registry.register(self)
        disable_created_metrics()  # type: ignore[no-untyped-call]

        def histogram(name: str, text: str, edges: tuple[float, ...]) -> Histogram:
            return Histogram(f"lorafit:{name}", text, _LABELS, buckets=edges, registry=self._registry)

        self._first = histogram("time_to_first_token_seconds", "Wait for a first token.", _FIRST_TOKEN_SECONDS)
        self._whole = histogram("e2e_request_latency_seconds", "Time of whole answers.", _ANSWER_SECONDS)
        self._asked = histogram(
            "request_prompt_tokens", "Lengths of prompts, each told once however many answers it gets.", _TOKENS
        )
        self._answered = histogram("request_generation_tokens", "Lengths of whole answers.", _TOKENS)
        text = "Answers that begin as one does that declines."
        self._refused = Counter("lorafit:request_refusals", text, _LABELS, registry=self._registry)
        text = "Requests that were refused or failed, by the HTTP code; of a stream that of its error event."
        self._errors = Counter("lorafit:http_errors", text, ("model_name", "code"), registry=self._registry)
        self._told = (self._first, self._whole, self._asked, self._answered, self._refused)

    def forget(self, adapter: str) -> None:
        """Drops the figures of an adapter that was unloaded: of thousands that come and go none may stay in memory."""
        for each in self._told:
            each.remove(self._model_name, adapter)

    def _is_served(self, adapter: str | None) -> bool:
        return adapter is None or adapter in self._engine.adapters

    def first_token(self, adapter: str | None, seconds: float) -> None:
        """The first token of an answer came after this time."""
        if self._is_served(adapter):
            self._first.labels(self._model_name, adapter or "").observe(seconds)

    def end(self, adapter: str | None, seconds: float, prompt_tokens: int | None, tokens: int, text: str) -> None:
        """A whole answer was there after this time; to a prompt of another answer where no length of it is told."""
        if not self._is_served(adapter):
            return
        labels = self._model_name, adapter or ""
        self._whole.labels(*labels).observe(seconds)
        if prompt_tokens is not None:
            self._asked.labels(*labels).observe(prompt_tokens)
        self._answered.labels(*labels).observe(tokens)
        self._refused.labels(*labels).inc(declines(text))

    def http_error(self, code: int) -> None:
        """A request was refused, or failed."""
        self._errors.labels(self._model_name, str(code)).inc()

    def register(self, collector: Collector) -> None:
        """Takes figures of somebody else's up."""
        self._registry.register(collector)

    def text(self) -> bytes:
        """In Prometheus' text form."""
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """What the engine counts, as prometheus_client asks for it."""
        figures, name = self._engine.figures(), self._model_name
        for state, number in (("running", figures.running), ("waiting", figures.waiting)):
            gauge = GaugeMetricFamily(f"lorafit:num_requests_{state}", f"Requests {state}.", labels=["model_name"])
            gauge.add_metric([name], number)
            yield gauge
        for key, text, tokens in (
            (
                "prompt_tokens",
                "Tokens of prompts, each counted once however many answers it gets.",
                figures.prompt_tokens,
            ),
            ("generation_tokens", "Tokens of answers.", figures.written_tokens),
        ):
            counter = CounterMetricFamily(f"lorafit:{key}", text, labels=_LABELS)
            for adapter, number in tokens.items():
                if self._is_served(adapter):
                    counter.add_metric([name, adapter or ""], number)
            yield counter
        text = "Answers that are over, by end: a request for several counts as many."
        ended = CounterMetricFamily("lorafit:request_success", text, labels=(*_LABELS, "finished_reason"))
        for (adapter, reason), number in figures.finished.items():
            if reason in _REASONS and self._is_served(adapter):
                ended.add_metric([name, adapter or "", _REASONS[reason]], number)
        yield ended
