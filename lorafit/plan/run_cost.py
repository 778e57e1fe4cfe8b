"""Time and money of a run: its flops over what a card really sustains."""

from __future__ import annotations

import math
from dataclasses import dataclass

from lorafit.contracts import JsonObject
from lorafit.errors import UsageError
from lorafit.facts import DatasetFacts, DeviceFacts
from lorafit.machine.devices import peak_flops
from lorafit.memory import StepShape
from lorafit.ops.recomputed_layers import Checkpointing
from lorafit.plan.flops import Flops, count_flops

UTILISATION, LOW_UTILISATION, HIGH_UTILISATION = 0.35, 0.2, 0.5
"""Share of a card's peak that training sustains, recomputation counted as work. An assumption. Published runs, by
`count_flops`: Mistral-7B on an A100, rows of 4,096 tokens: LoRA 0.54, QLoRA 0.41 and 0.51 (foundation-model-stack/
fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv); Qwen-7B LoRA on an A100, one row a forward: 0.23 at 256
tokens, 0.40 at 1,024, 0.47 at 4,096, and 0.09 to 0.41 with Q-LoRA (QwenLM/Qwen, README, profiling)."""

SAMPLE_TOKENS = 10**6
_MOST_PRICE = 1e6


@dataclass(frozen=True)
class RunCost:
    """What the run, or a million of its tokens, takes.

    Attributes:
        tokens: Tokens that are trained on, padding apart.
        is_whole_run: Whether that is all of the run; else a million tokens in rows of the assumed length.
        device: Name of the card; None: none was named, or its peak is not known.
        peak_flops: Of the card, a second.
    """

    tokens: int
    is_whole_run: bool
    flops: Flops
    device: str | None
    peak_flops: float | None
    price_per_hour: float | None

    def seconds(self, utilisation: float = UTILISATION) -> float | None:
        """Expected time; None where no peak is known."""
        return self.flops.total / (self.peak_flops * utilisation) if self.peak_flops else None

    def price(self, utilisation: float = UTILISATION) -> float | None:
        """Expected price, in the currency of the price per hour."""
        seconds = self.seconds(utilisation)
        return None if seconds is None or self.price_per_hour is None else seconds / 3600 * self.price_per_hour

    def to_json(self) -> JsonObject:
        """Plain numbers; each range from high to low utilisation."""
        shares = {"expected": UTILISATION, "least": HIGH_UTILISATION, "most": LOW_UTILISATION}
        has_price = self.price_per_hour is not None
        return {
            "tokens": self.tokens,
            "is_whole_run": self.is_whole_run,
            "flops": self.flops.to_json(),
            "device": self.device,
            "peak_flops_per_second": self.peak_flops,
            "utilisation": shares,
            "seconds": {name: self.seconds(share) for name, share in shares.items()} if self.peak_flops else None,
            "price_per_hour": self.price_per_hour,
            "price": {name: self.price(share) for name, share in shares.items()} if has_price else None,
        }


def check_price(price_per_hour: float | None, device: DeviceFacts | None) -> None:
    """Whether a price can be used.

    Raises:
        UsageError: It is no price, or no card with a known peak was named.
    """
    if price_per_hour is None:
        return
    if not math.isfinite(price_per_hour) or not 0 <= price_per_hour <= _MOST_PRICE:
        raise UsageError(
            f"{price_per_hour:g} is out of range",
            key="--price-per-hour",
            todo=f"a price lies in the range 0 to {_MOST_PRICE:,.0f}",
        )
    if device is None or peak_flops(device) is None:
        raise UsageError(
            "a price needs a card whose speed is known", key="--price-per-hour", todo="name one, e.g. --gpu rtx-4090"
        )


def cost_of_run(
    step: StepShape,
    dataset: DatasetFacts | None,
    *,
    epochs: float,
    checkpointing: Checkpointing,
    device: DeviceFacts | None,
    price_per_hour: float | None,
) -> RunCost:
    """Flops, time and price.

    Args:
        step: The training step; a card's peak is that of 16 bits, and says nothing of one in fp32.
        dataset: Facts of the rows; None: a million tokens are counted in rows like the step's.
        epochs: Passes over the rows, parts included.
        checkpointing: Which layers run forward twice.
        device: The card; None: none.
        price_per_hour: Of the card, in any currency.
    """
    if dataset is not None:
        one = (dataset.tokens, dataset.trained_tokens, dataset.squared_tokens)
        tokens, labelled, squared = (round(number * epochs) for number in one)
    else:
        tokens, squared = SAMPLE_TOKENS, SAMPLE_TOKENS * step.row_tokens
        labelled = SAMPLE_TOKENS * step.row_labels // step.row_tokens
    flops = count_flops(
        step.model,
        adapter_parameters=step.trainable_parameters,
        tokens=tokens,
        labelled_tokens=labelled,
        squared_tokens=squared,
        checkpointing=checkpointing,
    )
    peak = peak_flops(device) if device is not None and step.dtype != "fp32" else None
    name = device.name if device is not None and peak is not None else None
    return RunCost(tokens, dataset is not None, flops, name, peak, price_per_hour if peak else None)
