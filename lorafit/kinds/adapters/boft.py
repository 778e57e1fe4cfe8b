"""BOFT: the inputs of a frozen linear are turned by several rounds of small rotations, and each output is scaled.

    W' = diag(s) W (B_m ... B_1)^T      B_i = P_i diag(R_1, ..., R_n) P_i^T      R = (I - Q) (I + Q)^-1, Q = -Q^T

Q is zero at the start, and s one.

Each round turns blocks of b inputs, taken together in another way: as a butterfly of the fast Fourier transform.

PEFT makes a block-diagonal matrix of several rounds by a CUDA extension that it compiles, and without it drops all
rounds but the first. Here that is one torch operation, on every device. Plain PEFT opens an adapter of several rounds
only where it can compile; one of a single round it opens everywhere.

Source: Liu et al. 2023, BOFT (https://arxiv.org/abs/2311.06243), section 4 and equation 4.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from pydantic import Field

from lorafit.contracts import JsonMapping, JsonObject
from lorafit.errors import ModelError, RecipeError
from lorafit.kinds.adapter_parts import SavedField
from lorafit.kinds.adapters import adapters
from lorafit.kinds.adapters._linears import AtLinears, Change, LinearFolding
from lorafit.kinds.folding import AdaptedLayer
from lorafit.kinds.linear_targets import LinearsSection

if TYPE_CHECKING:
    import torch
    from peft import PeftConfig

    from lorafit.facts import LinearShape


class BoftSection(LinearsSection):
    """Rounds of small rotations of the inputs of frozen linears, and a scale for each output."""

    kind: Literal["boft"] = "boft"
    """BOFT; it computes with square matrices as wide as a linear's inputs, so it is for small models."""
    block_size: int = Field(default=4, ge=2, le=1024)
    """Inputs that one rotation turns; must divide the inputs of every target, and be even with several rounds."""
    rounds: int = Field(default=1, ge=1, le=12)
    """Rounds of rotations; of more than one, block_size * 2^(rounds - 1) must divide the inputs of every target."""


class BlockDiagonal:
    """What PEFT's CUDA extension computes, by torch: blocks on the diagonal of square matrices.

    [rounds, blocks, b, b] --> [rounds, blocks * b, blocks * b]
    """

    def forward(self, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The matrices."""
        rounds, count, size, _ = blocks.shape
        made = blocks.new_zeros(rounds, count, size, count, size)
        made.diagonal(dim1=1, dim2=3).copy_(blocks.permute(0, 2, 3, 1))
        return [made.view(rounds, count * size, count * size)]

    def backward(self, gradient: torch.Tensor, blocks: torch.Tensor) -> list[torch.Tensor]:
        """The gradient of the blocks, of that of the matrices."""
        rounds, count, size, _ = blocks.shape
        diagonal = gradient.reshape(rounds, count, size, count, size).diagonal(dim1=1, dim2=3)
        return [diagonal.permute(0, 3, 1, 2).contiguous()]


def _compile_nothing() -> None:
    """Puts `BlockDiagonal` where PEFT keeps its extension once it is compiled, and `butterfly` where it makes orders.

    PEFT's own reads each number of an order from a tensor, of which a model without values has none.
    """
    from peft.tuners.boft import layer

    loaded: Any = layer
    loaded._FBD_CUDA = BlockDiagonal()
    loaded.BOFTLayer.block_butterfly_perm = _order
    loaded.BOFTLayer.perm2mat = _matrix


def _order(layer: object, inputs: int, groups: int, half_block: int, rounds: int) -> torch.Tensor:
    return butterfly(inputs, groups, 2 * half_block)


def _matrix(layer: object, order: torch.Tensor) -> torch.Tensor:
    import torch

    return torch.eye(len(order))[order]


class BoftFolding(LinearFolding):
    """Rows of the weight turned round by round, and scaled."""

    parts: ClassVar[Mapping[str, str]] = {"boft_R": "R", "boft_s": "s"}
    new_weight: ClassVar[str] = "diag(s) W R^T, R a rotation"

    def features(self, layer: AdaptedLayer) -> tuple[int | None, int | None]:
        """Inputs are the blocks' own, outputs the scales'."""
        shape = layer.tensors["R"].shape
        if len(shape) != 4 or shape[2] != shape[3]:
            raise ModelError(f"its rotations are {list(shape)}, which no blocks are", todo="get the adapter again")
        return shape[1] * shape[2], layer.tensors["s"].elements

    def change(self, layer: AdaptedLayer) -> Change:
        """Each row by round after round."""
        import torch

        values = self.read(layer.tensors["R"])
        scales = self.read(layer.tensors["s"]).reshape(-1, 1)
        skew, one = (values - values.mT) / 2, torch.eye(values.shape[-1], dtype=values.dtype)
        rotations = torch.linalg.solve(one + skew, one - skew, left=False)
        count, size = values.shape[1:3]
        orders = [butterfly(count * size, count >> number, size) for number in range(len(values))]

        def change(weight: torch.Tensor, first: int) -> torch.Tensor:
            for order, rotation in zip(orders, rotations, strict=True):
                there, back = torch.argsort(order), order
                blocks = weight[:, there].view(len(weight), count, size).transpose(0, 1)
                weight = (blocks @ rotation.mT).transpose(0, 1).reshape(weight.shape)[:, back]
            return weight * scales[first : first + len(weight)]

        return change


def butterfly(inputs: int, groups: int, block_size: int) -> torch.Tensor:
    """The order of inputs before a round: in each group, the even half-blocks first, then the odd ones.

    Source: the paper's section 4; peft.tuners.boft.layer.BOFTLayer.block_butterfly_perm.
    """
    import torch

    half = block_size // 2
    if inputs // groups <= block_size:  # the first round: blocks of neighbours
        return torch.arange(inputs)
    return torch.arange(inputs).view(groups, -1, 2, half).transpose(1, 2).reshape(inputs)


@adapters.register(BoftSection)
class Boft(AtLinears[BoftSection]):
    """PEFT's BOFT, with nothing to compile."""

    starts_as_base: ClassVar[bool] = False  # a bias is taken off and added again
    peft_type: ClassVar[str] = "BOFT"
    usual_rate: ClassVar[float] = 0.3  # as OFT's
    saved_fields: ClassVar[Mapping[str, SavedField]] = {
        key: SavedField(int, "a whole number", needed=True)
        for key in ("boft_block_size", "boft_block_num", "boft_n_butterfly_factor")
    }
    recipe_fields: ClassVar[Mapping[str, str]] = {
        "boft_block_size": "block_size",
        "boft_n_butterfly_factor": "rounds",
    }

    def layer_parameters(self, linear: LinearShape) -> int:
        """b x b for each block of each round, and a scale for each output."""
        size, rounds = self.section.block_size, self.section.rounds
        together = size * 2 ** (rounds - 1)
        if linear.in_features % together or (rounds > 1 and size % 2):
            what = f"blocks of {size} in {rounds} rounds do not fit the {linear.in_features} inputs of '{linear.name}'"
            todo = (
                f"choose it so that block_size * 2^(rounds - 1) divides {linear.in_features}, even with more than one"
            )
            raise RecipeError(what, key="adapter.block_size", todo=todo)
        return rounds * linear.in_features * size + linear.out_features

    def options(self, target_modules: Sequence[str]) -> JsonObject:
        """Size of a block, and rounds."""
        return {
            "boft_block_size": self.section.block_size,
            "boft_block_num": 0,
            "boft_n_butterfly_factor": self.section.rounds,
        }

    def peft_config(self, target_modules: Sequence[str], *, is_transposed: bool) -> PeftConfig:
        """PEFT's BOFTConfig."""
        _compile_nothing()
        return super().peft_config(target_modules, is_transposed=is_transposed)

    @classmethod
    def opened_config(cls, config: JsonMapping) -> JsonObject:
        """The saved one."""
        _compile_nothing()
        return dict(config)

    @classmethod
    def folding(cls, config: JsonMapping) -> BoftFolding:
        """diag(s) W R^T."""
        return BoftFolding(config, cls)
