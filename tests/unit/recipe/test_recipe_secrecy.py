"""Secrets are refused, wherever they stand, and never repeated."""

from __future__ import annotations

import traceback
from pathlib import Path

import pytest

from lorafit.errors import SafetyError
from lorafit.recipe.secrecy import is_secret_key, is_secret_value
from tests.support.recipe_texts import MINIMAL, Fails, Loads, parts

CANARY = "hf_CANARYcanary0123456789"


@pytest.mark.parametrize(
    "key",
    [
        *("token", "hf_token", "HF_TOKEN", "hfToken", "hub-token", "auth_token", "use_auth_token", "access.token"),
        *("api_key", "apiKey", "apikey", "wandb_api_key", "openai_key", "OPENAI_API_KEY", "access_key", "secret_key"),
        *(
            "aws_secret_access_key",
            "private_key",
            "ssh_key",
            "password",
            "db_passwd",
            "passphrase",
            "secret",
            "client_secret",
        ),
        *("credentials", "authorization", "bearer"),
    ],
)
def test_a_key_that_names_a_secret(key: str) -> None:
    assert is_secret_key(key)


@pytest.mark.parametrize(
    "key",
    [
        *("tokens", "micro_batch_tokens", "max_new_tokens", "pad_token", "eos_token", "bos_token", "special_tokens"),
        *("tokenizer", "tokenizer_type", "excess_token_handling", "token_count", "key", "keys", "keep_last", "monkey"),
        *("name", "output", "base", "author", "secretary", "passes", "additional_special_tokens", "image_token"),
    ],
)
def test_a_key_that_names_none(key: str) -> None:
    assert not is_secret_key(key)


@pytest.mark.parametrize(
    "value",
    [
        "hf_" + "a" * 34,
        CANARY,
        f"see {CANARY} for it",
        "sk-proj-" + "a1" * 12,
        "sk-ant-api03-" + "b2" * 12,
        "ghp_" + "a1" * 18,
        "github_pat_" + "a1" * 20,
        "glpat-" + "a1" * 10,
        "AKIAIOSFODNN7EXAMPLE",
        "AIza" + "a1" * 17,
        "xoxb-1234567890-abcdef",
        "eyJhbGciOiJIUzI1NiJ9.eyJzdWIiOiIxMjM0NTY3ODkwIn0.x",
        "-----BEGIN RSA PRIVATE KEY-----",
        "https://user:hunter2@example.org/data.jsonl",
    ],
)
def test_a_value_that_is_a_secret(value: str) -> None:
    assert is_secret_value(value)


@pytest.mark.parametrize(
    "value",
    [
        *("hf_run", "hf_baseline", "hf-internal-testing/tiny", "sk-learn", "task-1", "risk-free-model-of-everything"),
        *(
            "main",
            "a" * 40,
            "0123456789abcdef" * 2,
            "package://llm/x.gguf",
            "https://example.org/a.jsonl",
            "a@b.c",
            7,
            None,
        ),
    ],
)
def test_a_value_that_is_none(value: object) -> None:
    assert not is_secret_value(value)


PLACES = [
    f"hf_token: {CANARY}\n",
    "hf_token: abc\n",
    "hf_token: null\n",
    f"seed: {CANARY}\n",
    f"adapter: {{kind: {CANARY}}}\n",
    f"adapter: {{r: [{CANARY}]}}\n",
    f"tracking: [wandb, {CANARY}]\n",
    f"training: {{optimizer: {{api_key: {{nested: {CANARY}}}}}}}\n",
    f"evaluation: {{retention: [{{path: a, hub_token: {CANARY}}}]}}\n",
    f"{CANARY}: 1\n",
    f"output: https://me:{CANARY}@example.org\n",
    f"a: &x {CANARY}\nb: *x\n",
    f"extends: {CANARY}\n",
]


@pytest.mark.parametrize("line", PLACES)
def test_a_secret_is_refused_wherever_it_stands(fails: Fails, line: str) -> None:
    error = fails(MINIMAL + line)
    assert error.exit_code == 8
    assert "r.yaml:4:" in str(error)
    assert "use the environment" in str(error)
    assert "CANARY" not in "\n".join(parts(error))
    assert "CANARY" not in "".join(traceback.format_exception(error)), "--debug shows the traceback"


def test_what_else_is_wrong_with_a_secret_is_not_said(fails: Fails) -> None:
    error = fails(MINIMAL + "api_key: 0123\ndb: {password: [0456, no]}\n")
    assert [line.split(": ")[1] for line in parts(error)] == ["api_key", "db.password", "db"]
    assert not any(value in "".join(parts(error)) for value in ("0123", "0456", "'no'"))


def test_a_secret_comes_first_among_other_errors_and_hides_them_nowhere(fails: Fails) -> None:
    error = fails(
        f"naem: x\nmodel: {{base: b, api_key: {CANARY}}}\ndata: {{train: a, max_length: x}}\nhf_token: x\nseed: -1\n"
    )
    assert error.exit_code == 8
    lines = parts(error)
    assert [line.split(": ")[1] for line in lines] == ["model.api_key", "hf_token", "naem", "data.max_length", "seed"]
    assert "CANARY" not in "".join(traceback.format_exception(error))


@pytest.mark.parametrize(
    "flag",
    [
        f"hf_token={CANARY}",
        "hf_token=abc",
        f"name={CANARY}",
        "adapter={api_key: abc, r: 010}",
        f"{CANARY}=1",
        f"a.{CANARY}.b=1",
    ],
)
def test_a_secret_in_a_flag(fails: Fails, flag: str) -> None:
    error = fails(MINIMAL, [flag])
    assert error.exit_code == 8
    for line in (str(error), *parts(error)):
        assert line.startswith("--set ") or "first: --set " in line
        assert "CANARY" not in line
        assert "abc" not in line


def test_a_secret_in_a_flag_that_is_none(loads: Loads) -> None:
    with pytest.raises(Exception, match="--set") as caught:
        loads(MINIMAL, [f"hf_token {CANARY}"])
    assert "CANARY" not in str(caught.value)


def test_a_secret_in_what_is_extended(fails: Fails) -> None:
    Path("base.yaml").write_text(f"seed: 1\napi_key: {CANARY}\n")
    error = fails("extends: base.yaml\n" + MINIMAL)
    assert isinstance(error, SafetyError)
    assert str(error).startswith("base.yaml:2:1: api_key")


def test_words_of_tokenizers_and_plain_values_pass(loads: Loads) -> None:
    text = (
        "name: hf_baseline\nmodel: {base: hf-internal-testing/tiny, revision: '"
        + "a" * 40
        + "'}\ndata: {train: a.jsonl}\n"
    )
    assert loads(text).recipe.name == "hf_baseline"
