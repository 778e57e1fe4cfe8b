"""GGUF files as bases: converted once, bit-repeatably, into a folder of safetensors with tokenizer and chat template.

They may lie inside installed packages, which are not imported for that.

The dtype follows the file: fp32 where most of its values are F32, fp16 where they are F16, else bf16 (quantised types
hold fewer significant bits than bf16's eight, and most models were trained in it).
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import importlib.util
import json
import logging
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any

from lorafit.console.wording import first_line
from lorafit.contracts import JsonObject, Reporter
from lorafit.errors import ModelError
from lorafit.files.atomic import atomic_dir, check_manifest
from lorafit.files.cache import keep, kept, key_of_code, known_hash, locked, own_folder, refuse_foreign
from lorafit.model.base_config import load_config
from lorafit.model.quiet import quiet_libraries

if TYPE_CHECKING:
    import torch

PACKAGE_SCHEME = "package://"
CONVERSION = 1
"""Number of this conversion; it goes into the content name, so that a changed conversion makes another folder."""


def file_in_package(text: str) -> Path:
    """The file that `package://NAME/FILE.gguf` names.

    Raises:
        ModelError: It is no such name, or no installed package has the file; the message lists those that there are.
    """
    name, _, inside = text.removeprefix(PACKAGE_SCHEME).partition("/")
    if not name or not inside or ".." in PurePosixPath(inside).parts or not inside.lower().endswith(".gguf"):
        raise ModelError(
            f"'{text}' is not package://NAME/FILE.gguf", key="model.base", todo="name a .gguf file inside a package"
        )
    folders = _package_folders(name)
    if not folders:
        raise ModelError(
            f"no installed package is called '{name}'", key="model.base", todo=f"pip install {name}, or check the name"
        )
    for place in folders:
        if (place / inside).is_file():
            return place / inside
    found = sorted(p.relative_to(place).as_posix() for place in folders for p in place.rglob("*.gguf"))
    listed = f"it holds {', '.join(found[:5])}" if found else "it holds no .gguf file"
    raise ModelError(f"package '{name}' has no file {inside}", key="model.base", todo=listed)


def _package_folders(name: str) -> list[Path]:
    """Folders of an installed package, by import name or distribution name, without importing it."""
    import_names = [name] if name.isidentifier() else []
    try:
        distribution = importlib.metadata.distribution(name)
        listed = (distribution.read_text("top_level.txt") or "").split()
        listed += [Path(str(f)).parts[0] for f in distribution.files or [] if str(f).endswith("__init__.py")]
        import_names += [n for n in dict.fromkeys(listed) if n.isidentifier() and n not in import_names]
    except (importlib.metadata.PackageNotFoundError, ValueError):
        pass
    folders = []
    for import_name in import_names:
        spec = importlib.util.find_spec(import_name)  # of a top-level name: finds, does not import
        folders += [Path(p) for p in (spec.submodule_search_locations or [])] if spec else []
    return folders


def content_name(file: Path) -> str:
    """Name of the folder that a GGUF file is converted into: SHA-256 of its bytes and of the conversion's number.

    Raises:
        ModelError: It does not begin like a GGUF file.
    """
    with file.open("rb") as stream:
        magic = stream.read(4)
    if magic != b"GGUF":
        raise ModelError(f"is no GGUF file (it begins with {magic!r})", file=str(file), todo="get the file again")
    return hashlib.sha256(f"lorafit gguf {CONVERSION} {known_hash(file)}".encode()).hexdigest()


def convert_gguf(file: Path, bases: Path, reporter: Reporter) -> Path:
    """The folder `bases`/SHA256 of safetensors for a GGUF file; made if it is not there yet.

    Two processes that come at once are no problem: one converts, the other waits and takes the result.

    Raises:
        ModelError: No GGUF file, or an architecture that transformers cannot read.
        ResourceError: The disk is full.
    """
    folder = own_folder(bases) / content_name(file)
    refuse_foreign(folder)
    if _is_whole(folder):
        return folder
    with locked(bases / f".{folder.name}.lock"):
        if _is_whole(folder):
            return folder
        reporter.info(f"converting {file.name} to safetensors, once, into {folder}")
        with atomic_dir(folder, replace=True) as temporary:
            _convert(file, temporary, reporter)
    return folder


def _is_whole(folder: Path) -> bool:
    return check_manifest(folder, hash_of=known_hash) is None


def read_gguf_config(file: Path, bases: Path) -> JsonObject:
    """The config.json that converting would give, from the file's header alone, which takes seconds: it is kept.

    Raises:
        ModelError: No GGUF file, or an architecture that transformers cannot read.
    """
    folder = bases / content_name(file)
    refuse_foreign(folder)
    if check_manifest(folder, hashes=False) is None:
        return load_config(folder)
    name = f"configs/{key_of_code(folder.name)}.json"
    found: JsonObject | None = kept(name)
    if not isinstance(found, dict):
        from transformers import AutoConfig

        with _errors(file):
            config = AutoConfig.from_pretrained(str(file.parent), gguf_file=file.name)
            found = json.loads(config.to_json_string(use_diff=False))
        keep(name, found)
    return found


@contextlib.contextmanager
def _errors(file: Path) -> Iterator[None]:
    """Says what transformers and gguf raise in our words."""
    try:
        yield
    except Exception as error:  # struct.error, KeyError, ...: readers of foreign bytes share no base class
        what, todo = f"cannot be read as GGUF: {first_line(error)}", "get it again, or use safetensors"
        raise ModelError(what, file=str(file), todo=todo) from error


def _dtype(file: Path) -> torch.dtype:
    import torch
    from gguf import GGUFReader

    elements: Counter[str] = Counter()
    for tensor in GGUFReader(str(file)).tensors:
        elements[tensor.tensor_type.name] += int(tensor.n_elements)
    return {"F32": torch.float32, "F16": torch.float16}.get(elements.most_common(1)[0][0], torch.bfloat16)


@contextlib.contextmanager
def _tensors_shown(reporter: Reporter) -> Iterator[None]:
    """Shows how many tensors transformers has read in our bar, in place of its own, which knows no switch."""
    from transformers import modeling_gguf_pytorch_utils as reader

    def read(tensors: Sequence[Any], **options: Any) -> Iterator[Any]:
        with reporter.track(len(tensors), "converting tensors") as bar:
            for tensor in tensors:
                yield tensor
                bar.advance(1)

    theirs = reader.tqdm
    reader.tqdm = read
    try:
        yield
    finally:
        reader.tqdm = theirs


def _convert(file: Path, target: Path, reporter: Reporter) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    logging.getLogger("gguf").setLevel(logging.ERROR)
    with quiet_libraries(), _errors(file), _tensors_shown(reporter):
        place = str(file.parent)
        tokenizer = AutoTokenizer.from_pretrained(place, gguf_file=file.name)
        model = AutoModelForCausalLM.from_pretrained(
            place, gguf_file=file.name, dtype=_dtype(file), quantization_config=GgufConfig(dequantize=True)
        )
        model.config._name_or_path = ""
        model.save_pretrained(str(target))
        tokenizer.save_pretrained(str(target))
