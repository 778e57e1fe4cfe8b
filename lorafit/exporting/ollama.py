"""`--to ollama`: a GGUF and a Modelfile whose template and stops are those that were trained.

FOLDER/model.gguf      base and adapter merged; or adapter.gguf, beside a base that `--from-base` names
       Modelfile       FROM, ADAPTER, TEMPLATE, PARAMETER stop, num_ctx, temperature, repeat_penalty
"""

from __future__ import annotations

import shlex
from functools import partial
from pathlib import Path

from lorafit.data.chat.traced_template import CLOCK
from lorafit.errors import ModelError, UsageError
from lorafit.exporting import gguf, gguf_lora
from lorafit.exporting.exported import Exported
from lorafit.exporting.gguf_file import require_type
from lorafit.exporting.go_template import translate
from lorafit.exporting.llama_cpp import require_llama_cpp
from lorafit.exporting.probes import chats, render
from lorafit.exporting.source import Source
from lorafit.files.atomic import atomic_dir
from lorafit.model.tokenizer_files import DEFAULT

MODELFILE, _MODEL, _ADAPTER = "Modelfile", "model.gguf", "adapter.gguf"
_AS_MEASURED = ("PARAMETER temperature 0", "PARAMETER repeat_penalty 1")
"""`lorafit eval` scores the likeliest answer; Ollama's own are 0.8 and 1.1, which also changes a greedy answer."""
_MOST_POSITIONS = 8192  # what num_ctx asks for at most: its cache is memory from the first token on


def export(source: Source, output: Path) -> Exported:
    """Writes the folder. The template is translated first, so that nothing is merged for one that cannot be."""
    wish = source.wish
    text, notes = _template(source)
    if wish.from_base is None:
        data_type = require_type(wish.dtype)
        gguf.check(source)
        with (
            gguf.merged(source, output) as model,
            atomic_dir(output, replace=output.exists(), lists_files=False) as folder,
        ):
            proof = gguf.write_model(source, model, folder / _MODEL, data_type)
            _write(source, folder, [f"FROM ./{_MODEL}"], text)
    else:
        if wish.verify:
            require_llama_cpp()
        with atomic_dir(output, replace=output.exists(), lists_files=False) as folder:
            notes.append(f"{wish.from_base} was not compared with the base of the run")
            notes += gguf_lora.write_adapter(source, folder / _ADAPTER)
            proof = gguf_lora.prove(source, folder / _ADAPTER) if wish.verify else None
            _write(source, folder, [f"FROM {_base_there(wish.from_base)}", f"ADAPTER ./{_ADAPTER}"], text)
    command = shlex.join(["ollama", "create", source.place.name.lower(), "-f", str(output / MODELFILE)])
    return Exported("ollama", output, notes, command, proof)


def _base_there(named: str) -> str:
    """A base as a Modelfile names it: a file by its whole path, since Ollama goes from the Modelfile's folder."""
    if not named.endswith(".gguf"):
        return named
    file = Path(named).expanduser().absolute()
    if not file.is_file():
        raise UsageError("no such file", file=named, key="--from-base", todo="name a GGUF file, or a model of Ollama's")
    return str(file)


def _template(source: Source) -> tuple[str, list[str]]:
    """TEMPLATE, and what it cannot do."""
    if source.voice.chats is None:
        return "{{ .Prompt }}", ["it was trained on verbatim text: Ollama sends the prompt as it is"]
    text, notes = translate(partial(render, source), chats())
    if CLOCK in source.companions.templates[DEFAULT]:
        notes.append(f"the trained template writes a date, and Ollama's the one of {_date_of(source)} on every day")
    return text, [f"the template was compared with the trained one on {len(chats())} chats", *notes, _NO_TOOLS]


def _date_of(source: Source) -> str:
    """The date that the run's template is pinned to."""
    written = source.card.template_date if source.card is not None else None
    return "this export" if written is None else f"its training, {written[:10]}"


_NO_TOOLS = "tools are not in the template: Ollama will not offer any"


def _write(source: Source, folder: Path, lines: list[str], template: str) -> None:
    tokenizer, positions = source.voice.tokenizer, int(source.base.config.get("max_position_embeddings") or 2048)
    stops = [str(tokenizer.convert_ids_to_tokens(number)) for number in source.ends]
    if wrong := [stop for stop in stops if '"' in stop or "\n" in stop]:
        raise ModelError(f"a Modelfile cannot hold the stop {wrong[0]!r}", todo="use --to gguf")
    lines = [*lines, f'TEMPLATE """{template}"""', *(f'PARAMETER stop "{stop}"' for stop in stops)]
    lines += [f"PARAMETER num_ctx {min(positions, _MOST_POSITIONS)}", *_AS_MEASURED]
    (folder / MODELFILE).write_text("\n".join(lines) + "\n", encoding="utf-8")
