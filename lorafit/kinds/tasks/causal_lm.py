"""Next-token prediction: chats, prompts with completions, and plain text."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafit.kinds.tasks import tasks

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import torch

    from lorafit.contracts import Encoded, Sample


@tasks.register("causal-lm")
class CausalLm:
    """The loss is the cross-entropy of the trained tokens; an answer is generated text."""

    auto_class = "AutoModelForCausalLM"
    loss_unit = "tokens"

    def encode(self, sample: Sample, render: Callable[[Sample], Encoded | None]) -> Encoded | None:
        """The rendered row; None where no token is trained (the first cannot be: nothing stands before it)."""
        encoded = render(sample)
        return encoded if encoded is not None and any(encoded.trained[1:]) else None

    def build_loss(
        self, model: torch.nn.Module, objective: Callable[[torch.nn.Module], torch.nn.Module]
    ) -> torch.nn.Module:
        """The objective over the model as it is: cross-entropy over trained tokens."""
        return objective(model)

    def predict(self, prompts: Sequence[list[int]], generate: Callable[[Sequence[list[int]]], list[Any]]) -> list[Any]:
        """One generated answer a prompt."""
        return generate(prompts)
