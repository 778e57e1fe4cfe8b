"""What a user should know of a run before it starts, said with its plan."""

from __future__ import annotations

from lorafit.console.wording import counted
from lorafit.facts import DatasetFacts, DeviceFacts, ModelShape
from lorafit.kinds.adapters import adapters, usual_rate
from lorafit.kinds.optimizers import optimizers
from lorafit.kinds.schedules import warmup_steps
from lorafit.memory import StepMemory
from lorafit.plan.recipe_step import asks_to_keep
from lorafit.recipe.schema import Recipe

FEW_STEPS = 50
LORA_RATES = (1e-5, 5e-3)
"""Learning rates at which LoRA is trained at all, from the largest models to the smallest."""


def plan_warnings(
    recipe: Recipe, memory: StepMemory, dataset: DatasetFacts, device: DeviceFacts, total_steps: int
) -> tuple[str, ...]:
    training, shape, dtype = recipe.training, memory.step.model, memory.step.dtype
    found = [device.note] if device.note else []
    if dtype == "fp16" and device.kind == "cpu":
        found.append("fp16 on a CPU is slow and overflows easily; bf16 or fp32 is meant for it")
    wide = sorted({linear.name for linear in shape.linears if shape.decoder_parameters and not linear.quantizable})
    if dtype == "fp16" and wide:
        kept = f"{', '.join(wide)} stays in fp32"
        found.append(f"{shape.model_type} overflows in fp16, for which {kept}; bf16 or fp32 is meant for it")
    if dtype == "bf16" and not device.bf16:
        found.append(
            f"{device.name} has no bf16 arithmetic; it is emulated, and slow: fp16 on a GPU, fp32 on a CPU is faster"
        )
    if training.deterministic and device.kind != "cpu":
        found.append(
            "deterministic: the backward pass of attention is slower and holds more memory than estimated, and "
            "cuDNN's attention is not taken"
        )
    if memory.step.pictures and not memory.at(memory.least_tokens, memory.checkpointing or False).counts_pictures:
        found.append(
            "the vision tower does not run on tensors without values, and is in no estimate of memory: beside what is "
            "estimated it holds the states of a micro-batch's images for a moment"
        )
    if training.batch_size > dataset.rows:
        found.append(
            f"batch_size {training.batch_size} is more than the {counted(dataset.rows, 'row')}: "
            "every step is a whole epoch"
        )
    if total_steps < FEW_STEPS:
        steps = counted(total_steps, "optimizer step")
        how = "raise training.epochs or lower training.batch_size"
        if training.max_steps is not None:
            how = "raise training.max_steps"
        found.append(f"only {steps}; a model learns little in fewer than {FEW_STEPS}: {how}")
    warmup = warmup_steps(training.schedule, total_steps)
    if warmup >= total_steps > 1:
        found.append(
            f"the warmup takes all {total_steps} steps: the learning rate never gets to its height; lower "
            "training.schedule.warmup_steps"
        )
    every = recipe.evaluation.every_steps
    if every is not None and every > total_steps:
        found.append(
            f"evaluation.every_steps {every} is more than the run's {counted(total_steps, 'step')}: "
            "evaluated at its end only"
        )
    longest = dataset.longest_sequence_tokens
    if longest > shape.max_positions:
        found.append(f"the longest row has {longest} tokens; the model was made for {shape.max_positions}")
    if shape.expert_parameters and recipe.model.quantization.kind != "none":
        share = shape.expert_parameters / shape.total_parameters
        found.append(
            f"the experts ({share:.0%} of the parameters) are loaded unquantised: no quantisation reaches them"
        )
    if getattr(recipe.adapter, "target_modules", None) == "all-linear":
        found += _unreached(shape)
    if not shape.quantizable and recipe.model.quantization.kind != "none":
        found.append(f"transformers quantises no linear of {shape.model_type}: all weights are loaded as they are")
    found += _unusual_rate(recipe)
    if memory.step.optimizer.is_paged and device.kind != "cuda":
        found.append(f"{training.optimizer.kind} runs unpaged on a {device.kind}, which changes no update")
    if asks_to_keep(recipe.model.quantization) and not memory.step.keeps_unpacked:
        found.append("keep_unpacked has nothing to keep: no adapted linear is unpacked from 4 bits to model.dtype")
    return tuple(found)


def _unusual_rate(recipe: Recipe) -> list[str]:
    """A learning rate more than about 20 times away from the middle of what the adapter usually wants."""
    rate, factor = recipe.training.learning_rate, usual_rate(recipe.adapter)
    least, most = (float(f"{limit * factor:.6g}") for limit in LORA_RATES)
    if optimizers.bind(recipe.training.optimizer).follows_gradients or least <= rate <= most:
        return []
    begins = adapters.bind(recipe.adapter).initialisation()
    named = recipe.adapter.kind
    if begins is not None and begins.usual_rate != 1:
        named += f" with init {begins.section.kind}"
    far, how = ("high", "diverge") if rate > most else ("low", "hardly move")
    usual = f"which usually wants {least:g} to {most:g}"
    return [f"training.learning_rate {rate:g} is {far} for {named}, {usual}: the run may {how}"]


def _unreached(shape: ModelShape) -> list[str]:
    """What a user of `all-linear` may take for adapted: the experts, and linears that can carry no adapter."""
    found = []
    if shape.expert_parameters:
        share = shape.expert_parameters / shape.total_parameters
        found.append(f"the experts ({share:.0%} of the parameters) get no adapter: they are no linears")
    names: dict[str, list[str]] = {}
    for linear in shape.linears:
        if linear.left_out and linear.name not in names.setdefault(linear.left_out, []):
            names[linear.left_out].append(linear.name)
    return found + [f"{', '.join(linears)} get no adapter: {why}" for why, linears in names.items()]
