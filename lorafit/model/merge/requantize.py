"""Quantised weights made again from the base's files by their kinds, and proven to be those that training saw.

file rows --cast--> weights_dtype --quantise--> codes, absmax --> hashes == the run's? --> dequantised rows
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from lorafit.contracts import JsonMapping, Reporter
from lorafit.errors import NumericsError
from lorafit.files.safetensors import AnyEntry, StackedEntry, TensorEntry, read_rows
from lorafit.kinds.code_proofs import count_differences
from lorafit.kinds.quantizations import Packed, QuantizationSection, RebuiltRows, packed_kind
from lorafit.model.inspect import digest_of
from lorafit.model.names import Part
from lorafit.ops.import_bitsandbytes import import_bitsandbytes


class PlainRows:
    """A weight as a file holds it, read when asked for.

    Args:
        entry: In the file.
        dtype: What it is rounded to at once, as a model that loads it does; the file's own where None.
    """

    def __init__(self, entry: TensorEntry, dtype: torch.dtype | None = None) -> None:
        self.entry, self._dtype = entry, dtype

    def read(self, start: int, stop: int, into: torch.Tensor | None = None) -> torch.Tensor:
        """Rows of the tensor: `[stop - start, ...]`; `into`, where it fits."""
        rows = read_rows(self.entry, start, stop, into)
        return rows if self._dtype is None else rows.to(self._dtype)


def compare_proof(name: str, ours: JsonMapping, theirs: JsonMapping, *, same_device: bool) -> int:
    """Compares a rebuilt weight with what the run stored.

    Args:
        name: The weight's, for the message.
        ours: Proof of the rebuilt weight.
        theirs: The run's.
        same_device: Whether it was quantised on the same kind of device as now.

    Returns:
        Codes that are one level off; 0 where both are equal. Only another kind of device may have any.

    Raises:
        NumericsError: They differ and the device is the same, or nothing tells by how much.
    """
    exact = ("codes", "constants", "nested")
    wrong = [key for key in exact if ours.get(key) != theirs.get(key)]
    if not wrong:
        return 0
    sums = [key for key in ("code_sums", "constant_sums") if key in theirs]
    if same_device or not sums or "nested" in wrong:
        raise NumericsError(
            f"the rebuilt base differs from the one the run was trained on ({', '.join(wrong)})",
            key=name,
            todo="use the run's own base files; else merge with --base original",
        )
    return max(1, sum(count_differences(ours[key], theirs[key]) for key in sums))


def noted_kind(used: JsonMapping, proof: JsonMapping) -> type[Packed[QuantizationSection]] | None:
    """The kind of one weight: as noted with it, or with all, by runs of earlier versions; None where it is none."""
    return packed_kind(str(proof.get("kind", used["kind"])))


class Rebuilder:
    """The quantised layers of a run, each made again when its rows are asked for, and proven.

    Args:
        entries: The base's tensors.
        used: The run's quantization.json.
        homes: Where each layer's weight lies in the files, by path.
    """

    def __init__(
        self, entries: Mapping[str, TensorEntry], used: JsonMapping, homes: Mapping[str, Sequence[Part]]
    ) -> None:
        import_bitsandbytes()
        self._entries, self._used, self._homes = entries, used, homes
        self._recent: dict[str, RebuiltRows] = {}
        self._proofs: dict[str, JsonMapping] = {}
        self._codes_off = 0

    def rows(self, path: str) -> RebuiltRows:
        """A layer's values as training saw them. The last one is remembered: several tensors may hold its rows.

        Raises:
            NumericsError: They are not those of the run.
        """
        if path not in self._recent:
            proof, parts = self._used["tensors"][path], self._homes[path]
            kind = noted_kind(self._used, proof)
            assert kind is not None, "quantization.json was checked"
            made = kind.rebuild(_stack(self._entries, parts), self._used, proof)
            off = compare_proof(parts[0].name, made.proof, proof, same_device=self._used.get("device") == "cpu")
            self._codes_off += 0 if path in self._proofs else off
            self._proofs[path] = made.proof
            self._recent = {path: made}
        return self._recent[path]

    def conclude(self, allowed_share: float, reporter: Reporter) -> int:
        """Codes that are one level off, once all layers were made again.

        Args:
            allowed_share: Of all codes, how many may be.
            reporter: Warned where some are.

        Raises:
            NumericsError: More are, or all together are not those of the run.
        """
        for path in self._homes.keys() - self._proofs.keys():  # its rows are another's too, and were written as those
            self.rows(path)
        total = sum(_stack(self._entries, parts).elements for parts in self._homes.values())
        todo = "use the run's own base files"
        if self._codes_off > allowed_share * total:
            raise NumericsError(
                f"{self._codes_off} of {total} codes of the rebuilt base differ from the run's",
                todo=f"{todo}; else merge with --base original",
            )
        if self._codes_off:
            device = self._used.get("device")
            reporter.warn(f"{self._codes_off} of {total} codes are one level off: trained on {device}")
        elif self._used.get("digest") not in (None, digest_of(self._proofs)):
            raise NumericsError("the rebuilt base has another digest than the run's", todo=todo)
        return self._codes_off


def _stack(entries: Mapping[str, TensorEntry], parts: Sequence[Part]) -> AnyEntry:
    pieces = tuple(entries[part.name].as_matrix().rows_between(part.start, part.stop) for part in parts)
    return pieces[0] if len(pieces) == 1 else StackedEntry(pieces)
