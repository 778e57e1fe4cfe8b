"""What goes to PEFT, vLLM, Ollama and the hub: opened by plain PEFT, no place of this machine, one commit, a card that
the hub's library reads; and what each target refuses.
"""

from __future__ import annotations

import json
import re
import socket
import ssl
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import lorafit
from lorafit.contracts import Silent
from lorafit.errors import LorafitError, ModelError, ResourceError, UsageError
from lorafit.exporting.export import export
from lorafit.exporting.exported import Wish
from lorafit.exporting.ollama import _template
from lorafit.exporting.readme import note_quantised, say_base, say_use, say_what
from lorafit.exporting.source import open_source
from lorafit.facts import ModelClass
from lorafit.files.rundir import RunDir
from lorafit.kinds.quantizations import quantizations
from lorafit.model.adapter import AdapterFolder, save_adapter
from lorafit.model.attach import attach_adapter
from lorafit.run.workspace import open_run
from tests.support.adapted import added, load, logits, open_base, randomise
from tests.support.pretended_hub import Handler, Hub, pretended_hub
from tests.support.tiny_model import make_base
from tests.support.tiny_recipe import make_rows, train_tiny
from tests.unit.exporting.test_gguf import low_rank_section

FORMS = [
    ("lora", {}),
    ("rslora", {"r": 4}),
    ("rslora", {}),
    ("lora", {"ranks": {"q_proj": 2, "down_proj": 9}}),
    ("rslora", {"ranks": [2, 5]}),
    ("lora", {"layers": {"last": 1}}),
    ("adalora", {"init_r": 8}),
    ("vera", {}),
    ("miss", {}),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    found = train_tiny(folder, test=make_rows(12, first=200))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORAFIT_CACHE", str(folder / "cache"))
        lorafit.evaluate(folder / "run", quiet=True)
    return found


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("HF_TOKEN", raising=False)


def adapted(folder: Path, kind: str = "lora", **fields: Any) -> tuple[Any, Path]:
    base = open_base(make_base(folder / "base"))
    model = attach_adapter(load(base), low_rank_section(kind, **fields), 0)
    randomise(model)
    (folder / "adapter").mkdir()
    save_adapter(model, folder / "adapter", base=base)
    return model, folder / "adapter"


def opened(base: Path, folder: Path) -> Any:
    plain = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32, attn_implementation="eager")
    return PeftModel.from_pretrained(plain, folder)


@pytest.mark.parametrize(("kind", "fields"), FORMS)
def test_vllm_gets_one_rank_one_scale_and_the_same_update(tmp_path: Path, kind: str, fields: dict[str, Any]) -> None:
    """vLLM computes lora_alpha / r for every layer, and reads neither patterns nor anything it does not know."""
    model, adapter = adapted(tmp_path, kind, **fields)
    found = export(adapter, to="vllm", output=tmp_path / "v")
    config = json.loads((tmp_path / "v" / "adapter_config.json").read_text())
    tensors = load_file(tmp_path / "v" / "adapter_model.safetensors")
    assert {t.shape[0] for name, t in tensors.items() if "lora_A" in name} == {config["r"]}
    assert not (config["use_rslora"] or config["rank_pattern"] or config["alpha_pattern"])
    assert isinstance(config["lora_alpha"], int)
    for path, layer in model.named_modules():
        if hasattr(layer, "base_layer"):
            a, b = (tensors[f"{path}.lora_{part}.weight"].double() for part in "AB")
            update = config["lora_alpha"] / config["r"] * (b @ a)
            torch.testing.assert_close(update, added(layer), rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(logits(opened(tmp_path / "base", tmp_path / "v")), logits(model), rtol=1e-4, atol=1e-5)
    said = " ".join(found.notes)
    assert ("ranks or scales differ" in said) == ("ranks" in fields) and ("rsLoRA" in said) == (kind == "rslora")
    assert (f"{kind} is written as plain LoRA" in said) == (kind not in ("lora", "rslora"))
    assert f"--max-lora-rank {16 if config['r'] > 8 else 8}" in str(found.command)


def test_ranks_beyond_vllms_and_what_it_refuses(tmp_path: Path) -> None:
    _, adapter = adapted(tmp_path, r=600)
    with pytest.raises(ModelError, match="takes ranks up to 512, and the adapter's is 600; make it smaller"):
        export(adapter, to="vllm", output=tmp_path / "v")
    (tmp_path / "two").mkdir()
    _, adapter = adapted(tmp_path / "two", "dora")
    with pytest.raises(ModelError, match="vLLM cannot hold this adapter: the new weight of dora is m V"):
        export(adapter, to="vllm", output=tmp_path / "v")
    assert not (tmp_path / "v").exists()
    with pytest.raises(UsageError, match="--checkpoint: only a run has checkpoints"):
        export(adapter, to="peft", output=tmp_path / "v", checkpoint="7")


def test_what_cannot_be_merged_either_is_not_told_to_be(tmp_path: Path) -> None:
    _, adapter = adapted(tmp_path)
    file = adapter / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"lora_bias": True}))
    with pytest.raises(ModelError, match=r"vLLM cannot hold this adapter: it uses lora_bias; answer .* --to peft"):
        export(adapter, to="vllm", output=tmp_path / "v")
    with pytest.raises(ModelError, match="cannot be inspected: it uses lora_bias"):
        lorafit.inspect_adapter(adapter, quiet=True)


def test_a_folder_for_peft_holds_nothing_of_this_machine(run: Path, tmp_path: Path) -> None:
    found = lorafit.export(run, to="peft", output=tmp_path / "p", verify=True, quiet=True)
    names = {file.name for file in (tmp_path / "p").iterdir()}
    assert names == {
        *(
            "README.md",
            "adapter_config.json",
            "adapter_model.safetensors",
            "chat_template.jinja",
            "generation_config.json",
        ),
        *("tokenizer.json", "tokenizer_config.json"),
    }
    for file in (tmp_path / "p").iterdir():
        assert str(run.parent).encode() not in file.read_bytes()
    config = json.loads((tmp_path / "p" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] is None and "has no hub id" in found.notes[0]
    assert (
        found.proof is not None
        and found.proof.distance < 1e-6
        and "PEFT beside lorafit on the base as its files have it" in str(found)
    )
    assert "of their spread (bound 1e-05)" in str(found)
    assert found.to_json()["files"]["chat_template.jinja"] > 0


def test_a_wrong_folder_is_seen_by_verify(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lorafit.exporting import peft

    def scaled(*arguments: Any, **options: Any) -> list[str]:
        notes = written(*arguments, **options)
        file = arguments[1] / "adapter_model.safetensors"
        save_file({name: 2 * value for name, value in load_file(file).items()}, file)
        return notes

    written = peft.write_clean
    monkeypatch.setattr(peft, "write_clean", scaled)
    with pytest.raises(LorafitError, match="PEFT beside lorafit") as caught:
        export(run, to="peft", output=tmp_path / "p", verify=True)
    assert caught.value.exit_code == 9 and not (tmp_path / "p").exists()


def test_ollama_gets_the_trained_template_and_stops(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = export(run, to="ollama", output=tmp_path / "o")
    text = (tmp_path / "o" / "Modelfile").read_text()
    assert text.startswith('FROM ./model.gguf\nTEMPLATE """{{ range $i, $m := .Messages }}')
    assert 'PARAMETER stop "<|im_end|>"' in text and "PARAMETER num_ctx 256" in text
    assert text.endswith("\nPARAMETER temperature 0\nPARAMETER repeat_penalty 1\n")  # answers are scored greedily
    assert (
        tmp_path / "o" / "model.gguf"
    ).stat().st_size > 200_000 and "compared with the trained one on 20" in found.notes[0]
    (tmp_path / "base.gguf").touch()
    monkeypatch.chdir(tmp_path)
    found = export(run, to="ollama", output=Path("b c"), from_base="base.gguf")
    assert (
        (tmp_path / "b c" / "Modelfile").read_text().startswith(f"FROM {tmp_path}/base.gguf\n")
    )  # Ollama is elsewhere
    assert str(found.command) == "ollama create run -f 'b c/Modelfile'"
    found = export(run, to="ollama", output=tmp_path / "b", from_base="smollm2:135m")
    assert "smollm2:135m was not compared with the base of the run" in found.notes
    assert (tmp_path / "b" / "Modelfile").read_text().startswith("FROM smollm2:135m\nADAPTER ./adapter.gguf\n")
    assert sorted(file.name for file in (tmp_path / "b").iterdir()) == ["Modelfile", "adapter.gguf"]


def test_a_date_in_the_template_is_said(run: Path) -> None:
    source = open_source(run, Wish("ollama"), Silent())
    written = "{{ strftime_now('%Y') }}" + source.companions.templates["default"]
    dated = replace(source, companions=replace(source.companions, templates={"default": written}))
    assert "writes a date" in " ".join(_template(dated)[1]) and "a date" not in " ".join(_template(source)[1])


class Receiver(Handler):
    """A hub that takes commits: the requests of a push."""

    refuses = False

    def answer(self) -> None:
        if self.command != "POST":
            super().answer()
            return
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.requests.append(f"{self.command} {self.path}")
        assert self.headers["Authorization"] == "Bearer secret"
        if self.path == "/api/repos/create":
            if self.refuses:
                self.reply(403, b'{"error":"You have no right to write"}', Content_Type="application/json")
                return
            self.reply_json({"url": f"{self.hub.endpoint}/me/shop", "id": "me/shop"})
        elif "/preupload/" in self.path:
            files = json.loads(self.body)["files"]
            told = [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in files]
            self.reply_json({"files": told, "commitOid": "0" * 40})
        elif "/commit/" in self.path:
            pushed = [json.loads(line) for line in self.body.splitlines()]
            self.hub.add("models/me/shop", {p["value"]["path"]: b"" for p in pushed if p["key"] == "file"})
            url = f"{self.hub.endpoint}/me/shop/commit/1"
            self.reply_json({"commitUrl": url, "commitOid": "1" * 40, "success": True})
        elif self.path == "/api/validate-yaml":
            assert "library_name: peft" in json.loads(self.body)["content"]
            self.reply_json({"errors": [], "warnings": []})
        else:
            self.reply(404)


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    import huggingface_hub.constants as constants

    monkeypatch.setattr("tests.support.pretended_hub.Handler", Receiver)
    with pretended_hub() as made:
        monkeypatch.setattr(constants, "ENDPOINT", made.endpoint)
        monkeypatch.setenv("HF_TOKEN", "secret")
        yield made


def test_the_hub_gets_one_commit_with_card_and_adapter(run: Path, tmp_path: Path, hub: Hub) -> None:
    (run.parent / "run-hub").mkdir()
    (run.parent / "run-hub" / "of a dry run").touch()
    found = export(run, to="hub", repo="me/shop", license="apache-2.0")
    assert found.output is None and str(found.url).endswith("/me/shop/commit/1") and "pushed to" in str(found)
    commits = [request for request in hub.requests if "/commit/" in request]
    assert len(commits) == 1 and [*(run.parent / "run-hub").iterdir()] == [run.parent / "run-hub" / "of a dry run"]
    (files,) = hub.repos["models/me/shop"].commits.values()
    assert {"README.md", "adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= files.keys()


def test_a_hub_that_refuses_is_one_sentence(run: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Receiver, "refuses", True)
    with pytest.raises(ModelError, match=r"the hub took nothing: status 403") as caught:
        export(run, to="hub", repo="me/shop")
    assert "HF_TOKEN may write there" in str(caught.value) and "secret" not in str(caught.value)


def test_a_push_that_fails_is_told_and_keeps_nothing(
    run: Path, tmp_path: Path, hub: Hub, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the library raises for a network: and the same command can be given again."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError

    client: Any = import_module(HfHubHTTPError.__mro__[1].__module__.partition(".")[0])  # httpx, or what it is by now
    request = client.Request("POST", "https://huggingface.co/api/repos/create")
    unknown = client.ConnectError("[Errno -2] Name or service not known", request=request)
    unknown.__cause__ = socket.gaierror(-2, "Name or service not known")
    failures: list[tuple[Exception, str]] = [
        (unknown, "nothing was pushed: the hub cannot be reached (no address for"),
        (client.ConnectTimeout("timed out", request=request), "gave no answer for 10 seconds); connect, and"),
        (client.ProxyError("403", request=request), "nothing was pushed: the proxy refuses the hub; check HTTPS_PROXY"),
        (ssl.SSLCertVerificationError("self-signed"), "nothing was pushed: the certificate of"),
        (client.LocalProtocolError("Illegal header value b'Bearer secret'"), "HF_TOKEN holds what no token holds"),
        (RuntimeError("CAS service failed"), "the hub took nothing: CAS service failed"),  # its second library
    ]
    for failure, message in failures:

        def fails(*given: Any, failure: Exception = failure, **named: Any) -> None:
            raise failure

        for name in ("create_repo", "upload_folder"):
            with monkeypatch.context() as patch:
                patch.setattr(HfApi, name, fails)
                with pytest.raises(ModelError, match=re.escape(message)) as caught:
                    export(run, to="hub", repo="me/shop", output=tmp_path / "h")
            assert "secret" not in str(caught.value) and not list(tmp_path.glob("*h")), name
    with monkeypatch.context() as patch:
        patch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
        with pytest.raises(ModelError, match=r"nothing was pushed: HF_HUB_OFFLINE keeps .* unset it to push"):
            export(run, to="hub", repo="me/shop", output=tmp_path / "h")
    assert export(run, to="hub", repo="me/shop", output=tmp_path / "h").url


def test_the_card_is_what_the_hubs_library_reads(run: Path, tmp_path: Path) -> None:
    found = export(run, to="hub", repo="me/shop", license="apache-2.0", dry_run=True, output=tmp_path / "h")
    assert found.url is None and "nothing was sent" in found.notes[-1]
    card = ModelCard.load(tmp_path / "h" / "README.md")
    data = card.data
    assert (data.library_name, data.pipeline_tag, data.license) == ("peft", "text-generation", "apache-2.0")
    assert data.base_model is None and "lora" in data.tags and data.datasets is None
    (figure,) = data.eval_results
    report = json.loads((run / "report.json").read_text())["metrics"]["perplexity"]
    assert figure.metric_value == pytest.approx(report["tuned"])
    assert figure.metric_args["interval_95"] == pytest.approx([report["tuned_low"], report["tuned_high"]])
    assert str(run.parent) not in card.content and "`train.jsonl`" in card.content
    assert json.loads((run / "manifest.json").read_text())["data"] in card.content
    assert "What carried loss: every answer of the assistant" in card.content and "## Limits" in card.content


def test_a_path_that_could_be_a_data_set_of_the_hub_is_none(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows that are gone since are still files: a card must not name somebody's data set."""
    opened = open_run(run)
    recipe = opened.loaded.recipe
    train = [recipe.data.train[0].model_copy(update={"path": path}) for path in ("mine/gone.jsonl", "org/rows")]
    recipe = recipe.model_copy(update={"data": recipe.data.model_copy(update={"train": train})})
    moved = replace(opened, loaded=replace(opened.loaded, recipe=recipe))
    monkeypatch.setattr("lorafit.exporting.source.open_run", lambda path: moved)
    export(run, to="hub", repo="me/shop", dry_run=True, output=tmp_path / "h")
    card = ModelCard.load(tmp_path / "h" / "README.md")
    assert card.data.datasets == ["org/rows"] and "Trained on `gone.jsonl`, `org/rows`" in card.content
    assert "mine/gone" not in card.content


def test_the_card_opens_a_classifier_with_its_own_class(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = open_source(run, Wish("hub"), Silent())
    head = ModelClass("AutoModelForSequenceClassification", {"num_labels": 3}, has_new_head=True)
    monkeypatch.setattr(type(source.card), "model_class", head)
    grown = replace(source, base=replace(source.base, new_tokens=("<new>",)))
    text = say_use(grown, "me/shop")
    assert "AutoModelForSequenceClassification.from_pretrained(base, dtype=torch.float32, num_labels=3)" in text
    assert "model.resize_token_embeddings(len(tokenizer))" in text and "CausalLM" not in text
    assert "print(model(**inputs).logits.softmax(-1))" in text
    for config, printed in (
        ({"num_labels": 1}, "print(model(**inputs).logits)"),  # a reward is no share of anything
        ({"num_labels": 2, "problem_type": "regression"}, "print(model(**inputs).logits)"),
        ({"num_labels": 2, "problem_type": "multi_label_classification"}, "print(model(**inputs).logits.sigmoid())"),
    ):
        monkeypatch.setattr(type(source.card), "model_class", replace(head, config=config))
        assert printed in say_use(grown, "me/shop")


def test_a_base_of_the_hub_is_named(tmp_path: Path) -> None:
    _, adapter = adapted(tmp_path)
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": "org/base"}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    (adapter / "lorafit.json").unlink()  # another tool's: adapter_config.json alone says what the base is
    place = {"output": tmp_path / "h", "base_model": str(tmp_path / "base")}
    found = export(adapter, to="hub", repo="me/x", dry_run=True, **place)
    data = ModelCard.load(tmp_path / "h" / "README.md").data
    assert data.base_model == "org/base" and "base_model:adapter:org/base" in data.tags
    assert data.to_dict()["base_model_relation"] == "adapter" and "no licence" in " ".join(found.notes)


def asked(source: Any, folder: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What stands after a README's lines were run beside the base's and the repository's folders."""
    lines = say_use(source, "me/shop").partition("```python\n")[2].removesuffix("```").replace("tokens=64", "tokens=8")
    monkeypatch.chdir(folder)
    found: dict[str, Any] = {}
    exec(lines, found)
    return found


def test_the_lines_of_a_readme_answer_as_lorafit_does(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    export(run, to="hub", repo="me/shop", dry_run=True, output=tmp_path / "me" / "shop")
    source = open_source(run, Wish("hub"), Silent())
    (tmp_path / "BASE").symlink_to(source.base.path)
    assert say_use(source, "me/shop") in (tmp_path / "me" / "shop" / "README.md").read_text()
    asked(source, tmp_path, monkeypatch)
    printed = capsys.readouterr().out
    (answer,) = lorafit.generate(run, ["What can you do?"], max_new_tokens=8, quiet=True).answers
    assert printed == f"{answer.text}\n"
    assert not any(place in say_base(source, ".") + say_what(source) for place in (str(run.parent), "/tmp"))
    assert f"`{source.base.origin.digest}`" in say_what(source) and "Fingerprint of the base" in say_what(source)


def test_a_readme_opens_a_quantised_base_as_it_was_trained(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    section = quantizations.make_section("nf4", compute_dtype="fp32")
    quantised = source_with(run, monkeypatch, quantization=section)
    export(run, to="peft", output=tmp_path / "me" / "shop")
    (tmp_path / "BASE").symlink_to(quantised.base.path)
    model = asked(quantised, tmp_path, monkeypatch)["model"]
    linear = model.get_base_model().model.layers[0].mlp.down_proj.base_layer
    assert linear.weight.quant_type == "nf4" and linear.compute_dtype == torch.float32
    assert "bnb_4bit_use_double_quant=True" in say_use(quantised, "me/shop")  # a CPU's first forward undoes it
    for to in ("peft", "vllm", "gguf-lora"):
        notes = export(run, to=to, output=tmp_path / to).notes
        assert sum("trained on the base in nf4: on other weights it answers less well" in note for note in notes) == 1
    found = export(run, to="hub", repo="me/shop", dry_run=True, output=tmp_path / "hub").notes
    assert "README.md opens the base so" in " ".join(found)
    for kind, words in (("int8", "packed = BitsAndBytesConfig(load_in_8bit=True)\n"), ("mixed", "")):
        section = quantizations.make_section(kind)
        text = say_use(source_with(run, monkeypatch, quantization=section), "me/shop")
        assert words in text and ("BitsAndBytes" in text) == bool(words)
    assert (
        "lorafit generate opens the base so" in note_quantised(source_with(run, monkeypatch, quantization=section))[0]
    )


def source_with(run: Path, monkeypatch: pytest.MonkeyPatch, **values: Any) -> Any:
    """A run whose card says something else."""
    source = open_source(run, Wish("hub"), Silent())
    card = source.card.model_copy(update=values)  # type: ignore[union-attr]
    monkeypatch.setattr(AdapterFolder, "card", lambda self: card)
    return source


def test_a_base_of_a_gguf_file_is_made_by_the_readme(
    run: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    source = open_source(run, Wish("vllm"), Silent())
    origins = {
        "package": ("package://shop_models/a.gguf", 'find_spec("shop_models")'),
        "gguf": ("a.gguf", 'place = "."'),
    }
    for kind, (name, place) in origins.items():
        known = replace(source, base=source.base.known_as(kind=kind, name=name))
        monkeypatch.setattr("lorafit.exporting.source.open_source", lambda *given, known=known: known)
        found = export(run, to="vllm", output=tmp_path / kind)
        text = (tmp_path / kind / "README.md").read_text()
        assert place in text and 'gguf_file="a.gguf"' in text and "vllm serve BASE --enable-lora" in text
        assert str(found.command).startswith("vllm serve BASE ") and "README.md makes" in " ".join(found.notes)
        assert str(source.base.path) not in text and "PeftModel" not in " ".join(found.notes)


def test_an_author_may_name_the_base(run: Path, tmp_path: Path) -> None:
    found = export(run, to="hub", repo="me/x", dry_run=True, base_id="org/base", output=tmp_path / "h")
    card = ModelCard.load(tmp_path / "h" / "README.md")
    assert card.data.base_model == "org/base" and "stated by its author and was not compared" in card.content
    assert 'base, adapter = "org/base", "me/x"' in card.content and "## Base" not in card.content
    assert "stated by --base-id, and was not compared" in " ".join(found.notes)
    config = json.loads((tmp_path / "h" / "adapter_config.json").read_text())
    assert config["base_model_name_or_path"] == "org/base"
    source = open_source(run, Wish("hub", base_id="org/other"), Silent())
    ours = replace(source, base=source.base.known_as(kind="hub", name="org/base"))
    with pytest.raises(UsageError, match="--base-id: the adapter was trained on org/base; leave it out"):
        _ = ours.base_id


def test_the_card_says_which_step_it_is(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for checkpoint, best, said in (("2", None, "2 of 4"), (None, None, "4"), (None, 2, "2 of 4 (best on validation)")):
        monkeypatch.setattr(RunDir, "best_step", lambda self, best=best: best)
        place = tmp_path / said
        export(run, to="hub", repo="me/x", dry_run=True, checkpoint=checkpoint, output=place)
        assert f"| optimizer steps | {said} |" in (place / "README.md").read_text()


WRONG: list[tuple[dict[str, Any], str, int]] = [
    ({"to": "gguff"}, "'gguff' is no target; did you mean gguf?", 2),
    ({"to": "peft", "dtype": "f16"}, "--dtype: is of --to gguf and ollama; leave it out", 2),
    ({"to": "gguf", "repo": "a/b"}, "--repo: is of --to hub", 2),
    ({"to": "gguf", "dtype": "q4"}, "'q4' is no type of a GGUF's weights; use f32, f16, bf16, q8_0", 2),
    ({"to": "ollama", "from_base": "x", "dtype": "f16"}, "--dtype: is of a merge, and --from-base merges nothing", 2),
    ({"to": "gguf", "base": "new"}, "'new' is no base", 2),
    ({"to": "gguf", "base": "dequantized"}, "the run's base was not quantised", 5),
    ({"to": "hub"}, "--repo: --to hub needs a repository; name it OWNER/NAME", 2),
    ({"to": "hub", "repo": "no-owner"}, "needs a repository", 2),
    ({"to": "hub", "repo": "a/b"}, "no token is in the environment (HF_TOKEN)", 2),
    (
        {"to": "ollama", "from_base": "no.gguf"},
        "no.gguf: --from-base: no such file; name a GGUF file, or a model of",
        2,
    ),
    ({"to": "gguf", "base_id": "a/b"}, "--base-id: is of --to", 2),
    ({"to": "peft", "base_id": "no-owner"}, "--base-id: 'no-owner' is no id of the hub; name it OWNER/NAME", 2),
    ({"to": "peft", "checkpoint": "7"}, "no such checkpoint; there are steps 2, 4", 6),
    ({"to": "peft", "run": __file__}, "test_folders.py: is no run, recipe or adapter; name a run folder", 2),
    ({"to": "peft", "run": "nothing-here"}, "no such file or folder", 2),
]


@pytest.mark.parametrize(("given", "message", "code"), WRONG)
def test_bad_input_is_one_sentence(run: Path, tmp_path: Path, given: dict[str, Any], message: str, code: int) -> None:
    named = {"output": tmp_path / "out", **given}
    with pytest.raises(LorafitError, match=re.escape(message)) as caught:
        export(Path(named.pop("run", run)), **named)
    assert caught.value.exit_code == code and not (tmp_path / "out").exists() and not list(tmp_path.glob(".tmp-*"))


def test_an_output_is_never_written_over(run: Path, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("x")
    (tmp_path / "file").write_text("x")
    for to, place in [("peft", "full"), ("gguf", "file"), ("vllm", "file")]:
        with pytest.raises(UsageError, match="exists already"):
            export(run, to=to, output=tmp_path / place)
    (tmp_path / "none").mkdir()
    for folder in ("none", "full"):
        with pytest.raises(
            UsageError, match=r"is a folder, and this target is one file; name a file, such as .*run\.gguf"
        ):
            export(run, to="gguf", output=tmp_path / folder)
    (tmp_path / "empty").mkdir()
    assert export(run, to="peft", output=tmp_path / "empty").files["adapter_config.json"] > 0


def test_a_full_disk_and_a_stop_leave_nothing(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import errno

    from lorafit.exporting import gguf_lora

    for error, expected in ((OSError(errno.ENOSPC, "full"), ResourceError), (KeyboardInterrupt(), KeyboardInterrupt)):

        def fails(file: Path, *rest: Any, error: BaseException = error) -> None:
            file.write_bytes(b"half")
            raise error

        monkeypatch.setattr(gguf_lora, "write_gguf", fails)
        with pytest.raises(expected):
            export(run, to="gguf-lora", output=tmp_path / "a.gguf")
        assert not list(tmp_path.glob("*.gguf")) and not list(tmp_path.glob(".tmp-*"))


def test_verify_says_how_to_get_llama_cpp(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    for to in ("gguf", "gguf-lora", "ollama"):
        with pytest.raises(UsageError, match=r"^--verify: llama\.cpp is not installed; pip install llama-cpp-python"):
            export(run, to=to, verify=True, output=tmp_path / "out")
