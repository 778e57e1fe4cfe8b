"""Stage kernels: lorafit's operations against fp64 on the device, and bitsandbytes' codes against a CPU's."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from benchmarks.prove_gpu.verdicts import Check, Lack, at_most, is_so, worst
from benchmarks.prove_gpu.world import World, make_rows

if TYPE_CHECKING:
    from lorafit.ops.kernels import Kernels

EPSILONS = 2  # of the dtype: what rounding explains of an error relative to the norm
LEAST_ERROR = 1e-5  # of fp32, whose sums are long
MOST_CODES_OFF = 1e-5
ZERO_CODE = 7  # of NF4: the level 0
BLOCK = 64

Operation = Callable[..., Any]


def prove_kernels(world: World) -> Iterator[Check | Lack]:
    """Outputs and gradients of each operation in each dtype; then the codes."""
    import torch

    dtypes = (torch.bfloat16, torch.float16, torch.float32)
    tables, lacks = _tables(world)
    yield from lacks
    for name, operation, exact, shapes in operations(256 if world.is_small else 1024, tables):
        errors = {dtype: error_of(operation, exact, shapes, world.device, dtype) for dtype in dtypes}
        bounds = {dtype: max(EPSILONS * torch.finfo(dtype).eps, LEAST_ERROR) for dtype in dtypes}
        shown = ", ".join(f"{str(d).removeprefix('torch.')} {errors[d]:.1e}" for d in dtypes)
        held = all(errors[dtype] <= bounds[dtype] for dtype in dtypes)
        yield is_so(f"{name} against fp64", held, shown, " / ".join(f"{bounds[dtype]:.1e}" for dtype in dtypes))
    yield from _codes(world)


def _tables(world: World) -> tuple[dict[str, Kernels], list[Lack]]:
    """Those that a run may take on the device, by what is put behind an operation's name."""
    from lorafit.ops.kernel_choice import has_liger
    from lorafit.ops.kernels import FUSED, PLAIN
    from lorafit.ops.liger import LIGER

    if world.is_small:
        return {"": PLAIN}, []
    lacks = [] if has_liger() else [Lack("liger-kernel is not installed: its kernels are not compared")]
    return {"": FUSED} if lacks else {"": FUSED, " (Liger)": LIGER}, lacks


def operations(
    width: int, tables: Mapping[str, Kernels]
) -> Iterator[tuple[str, Operation, Operation, list[tuple[int, ...]]]]:
    """Name, operation, the same from plain products and functions in any dtype, and the shapes of the operands."""
    for suffix, kernels in tables.items():
        for name, *rest in _operations(width, kernels):
            yield f"{name}{suffix}", *rest


def _operations(width: int, kernels: Kernels) -> Iterator[tuple[str, Operation, Operation, list[tuple[int, ...]]]]:
    import torch
    from torch.nn import functional

    from lorafit.ops.cross_entropy import linear_cross_entropy
    from lorafit.ops.layer_functions import rms_norm, rotate, silu_product
    from lorafit.ops.lora_gated import lora_gated
    from lorafit.ops.lora_linear import AdaptedWeight, lora_linear

    rows, rank, words = 96, 16, 4 * width

    def adapted(weight: Any, a: Any, b: Any) -> AdaptedWeight:
        return AdaptedWeight(a, b, weight.detach(), None, None, 2.0)

    def linear(x: Any, weight: Any, a: Any, b: Any) -> Any:
        return x @ weight.T.detach() + 2.0 * (x @ a.T) @ b.T

    def gated(x: Any, *six: Any) -> Any:
        return functional.silu(linear(x, *six[:3])) * linear(x, *six[3:])

    def norm(x: Any, weight: Any) -> Any:
        return x * (x.square().mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.detach()

    def turned(x: Any, angle: Any) -> Any:
        cos, sin = (torch.cat([f(angle.detach())] * 2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat([-second, first], dim=-1) * sin

    def turned_by_ours(x: Any, angle: Any) -> Any:
        cos, sin = (torch.cat([f(angle.detach())] * 2, dim=-1).to(x.dtype) for f in (torch.cos, torch.sin))
        return rotate(x, x, cos, sin, kernels)[0]

    labels = torch.arange(rows) * 37 % words

    def losses(hidden: Any, head: Any) -> Any:
        return functional.cross_entropy(hidden @ head.T.detach(), labels.to(hidden.device), reduction="sum")

    def losses_by_ours(hidden: Any, head: Any) -> Any:
        return linear_cross_entropy(hidden, head.detach(), None, labels.to(hidden.device), kernels=kernels)

    one: list[tuple[int, ...]] = [(width, width), (rank, width), (width, rank)]
    yield "RMSNorm", lambda x, w: rms_norm(x, w.detach(), 1e-6, kernels), norm, [(rows, width), (width,)]
    yield (
        "silu(gate) * up",
        lambda g, u: silu_product(g, u, kernels),
        lambda g, u: functional.silu(g) * u,
        [(rows, width), (rows, width)],
    )
    yield "rotation", turned_by_ours, turned, [(2, 4, rows, 64), (2, 1, rows, 32)]
    yield (
        "linear with LoRA",
        lambda x, *three: lora_linear(x, None, adapted(*three), None, kernels),
        linear,
        [(rows, width), *one],
    )
    yield (
        "gate and up with LoRA",
        lambda x, *six: lora_gated(x, adapted(*six[:3]), adapted(*six[3:]), kernels)[0],
        gated,
        [(rows, width), *one, *one],
    )
    yield "cross-entropy in chunks", losses_by_ours, losses, [(rows, width), (words, width)]


def error_of(
    operation: Operation, exact: Operation, shapes: Sequence[tuple[int, ...]], device: str, dtype: Any
) -> float:
    """The largest error of the output and of any gradient, relative to its norm, against fp64 on the same device."""
    import torch

    generator = torch.Generator().manual_seed(0)
    values = []
    for shape in shapes:
        spread = shape[-1] ** -0.5 if len(shape) == 2 and shape[0] != 96 else 1.0
        values.append((torch.randn(shape, generator=generator) * spread).to(dtype).to(device))
    results = []
    for function, wide in ((operation, False), (exact, True)):
        operands = [(v.double() if wide else v.clone()).requires_grad_() for v in values]
        output = function(*operands)
        weights = torch.linspace(-1, 1, output.numel(), device=device, dtype=torch.float64).view(output.shape)
        (output * weights.to(output.dtype) if output.dim() else output).sum().backward()
        results.append([output, *(operand.grad for operand in operands)])
    pairs = [(one, other) for one, other in zip(*results, strict=True) if other is not None]
    if any(one is None for one, _ in pairs):
        return float("nan")
    return worst(float((one.detach().double() - other.detach()).norm() / other.detach().norm()) for one, other in pairs)


def _codes(world: World) -> Iterator[Check | Lack]:
    """Of every linear of the base for values, quantised on the device and on a CPU; and of a block of zeros."""
    import torch
    from bitsandbytes.functional import get_4bit_type, quantize_4bit

    from lorafit.contracts import Silent
    from lorafit.files.safetensors import read_index, read_rows
    from lorafit.job import open_job
    from lorafit.recipe.load import load_recipe

    base, lack = world.real()
    if lack:
        yield Lack(lack)
    folder = open_job(load_recipe(world.recipe(base, make_rows(8, (20, 30)))), Silent()).base.path
    levels = get_4bit_type("nf4", device="cpu").double()
    off = constants = total = 0
    for name, entry in read_index(folder).items():
        if not name.endswith("proj.weight"):
            continue
        weight = read_rows(entry).to(torch.bfloat16)
        ours, state = quantize_4bit(weight.to(world.device), blocksize=BLOCK, quant_type="nf4")
        theirs, other = quantize_4bit(weight, blocksize=BLOCK, quant_type="nf4")
        off += _different(ours.cpu(), theirs)
        constants += int((state.absmax.cpu() != other.absmax).sum())
        if total == 0:
            further = _off_nearest(ours.cpu(), state.absmax.cpu(), weight, levels) / weight.numel()
            yield at_most("NF4 codes off the nearest level, a matrix", further, MOST_CODES_OFF, "{:.1e}")
        total += weight.numel()
    yield at_most(f"NF4 codes unlike a CPU's, of {total:,}", off / total, MOST_CODES_OFF, "{:.1e}")
    yield is_so("constants unlike a CPU's", constants == 0, str(constants), "0")
    yield _zeros(world)


def _different(packed: Any, other: Any) -> int:
    """Codes, of which a byte holds two."""
    return sum(int((_half(packed, which) != _half(other, which)).sum()) for which in (0, 1))


def _half(packed: Any, which: int) -> Any:
    return packed.flatten() >> 4 if which == 0 else packed.flatten() & 15


def _off_nearest(packed: Any, absmax: Any, weight: Any, levels: Any) -> int:
    """Codes whose level is further from the value than another one, beyond what fp32 tells apart."""
    import torch

    codes = torch.stack([_half(packed, 0), _half(packed, 1)], dim=1).flatten().long()
    scaled = (weight.double().view(-1, BLOCK) / absmax.double()[:, None]).flatten()
    best = torch.full_like(scaled, float("inf"))
    for level in levels:
        best = torch.minimum(best, (scaled - level).abs())
    return int(((scaled - levels[codes]).abs() - best > 1e-6).sum())


def _zeros(world: World) -> Check:
    """A weight of zeros as lorafit loads it: bitsandbytes gives another code to it on a card."""
    import torch
    from safetensors.torch import load_file, save_file

    from lorafit.contracts import Silent
    from lorafit.job import open_job
    from lorafit.model.load import load_model
    from lorafit.recipe.load import load_recipe

    folder, tiny = world.folder / "with-zeros", world.tiny()
    folder.mkdir()
    for file in tiny.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    tensors = load_file(folder / "model.safetensors")
    name = next(name for name in tensors if name.endswith("down_proj.weight"))
    tensors[name][:4] = 0
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    job = open_job(load_recipe(world.recipe(folder, make_rows(8, (20, 30)))), Silent())
    model = load_model(
        job.base,
        quantization=job.recipe.model.quantization,
        dtype=torch.bfloat16,
        compute_dtype=torch.bfloat16,
        attention="sdpa",
        device=torch.device(world.device),
        model_class=job.task.model_class,
        reporter=Silent(),
    )
    packed = model.get_parameter(name).data.cpu().flatten()[: 4 * tensors[name].shape[1] // 2]
    codes = sorted({*_half(packed, 0).tolist(), *_half(packed, 1).tolist()})
    return is_so("codes of a block of zeros", codes == [ZERO_CODE], str(codes), str([ZERO_CODE]))
