"""Which parts of a layer train as one operation, known without torch: asked where forwards are replaced
(`lorafit.model.fuse`) and where their memory is counted (`lorafit.memory`)."""

from __future__ import annotations


def fuses_branch(*, of_known_class: bool, keeps_input: bool, transposed: bool) -> bool:
    """Whether a frozen linear and its LoRA branch run as `lorafit.ops.lora_linear`.

    Args:
        of_known_class: Whether it is torch's linear or bitsandbytes', no class of the model's own (Falcon's).
        keeps_input: Whether the linear's own operation keeps its input: LLM.int8() multiplies codes, not a weight.
        transposed: Whether its weight lies `[in, out]`: Conv1D.
    """
    return of_known_class and not (keeps_input or transposed)
