"""Bodies of requests, in OpenAI's forms. A field that would change an answer and is not served is refused by name."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
)

from lorafit.answering.sampling import Sampling
from lorafit.contracts import JsonObject

MOST_CHOICES = 16
_LEAST_TOP_P = 0.001

Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
Tokens: TypeAlias = Annotated[int, Field(ge=1)]


def _only(*neutral: object) -> AfterValidator:
    """Refuses a field that is not served, but where it changes nothing: with one of these values, or null."""

    def check(value: object) -> None:
        if value is not None and value not in neutral:
            others = f" or send {json.dumps(neutral[0])}" if neutral else ""
            raise ValueError(f"is not served here; leave it out{others}")

    return AfterValidator(check)


def _listed(value: object) -> object:
    return [value] if isinstance(value, str) else value


def _prompts(value: object) -> object:
    """Each prompt, a text or token ids."""
    prompts = [value] if isinstance(value, str) or _are_ids(value) else value
    if isinstance(prompts, list) and prompts and all(isinstance(one, str) or _are_ids(one) for one in prompts):
        return prompts
    raise ValueError("is neither a text nor token ids, nor a list of such")


def _are_ids(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(type(one) is int and 0 <= one < 1 << 31 for one in value)


class _Strict(BaseModel):
    """A form whose fields have the types that they are said to have: "0.5" is no number, and true is no 1."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class _Body(_Strict):
    """What every request may say of how its answer is written."""

    usual_temperature: ClassVar[float]

    temperature: float | None = Field(default=None, ge=0, le=10, allow_inf_nan=False)
    top_p: float | None = Field(default=None, ge=0, le=1, allow_inf_nan=False)
    seed: int | None = None

    def sampling(self, longest: int) -> Sampling:
        """How the tokens of an answer are chosen; without a seed each time anew."""
        temperature = self.usual_temperature if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None or temperature == 0 else max(self.top_p, _LEAST_TOP_P)
        seed = secrets.randbits(32) if self.seed is None else self.seed % (1 << 63)
        return Sampling(longest, temperature, top_p, seed)


class StreamOptions(_Strict):
    """Of a stream."""

    include_usage: bool | None = None
    include_obfuscation: bool | None = None
    """Padding against who reads along; there is none."""
    continuous_usage_stats: Annotated[object, _only(False)] = None


class _OpenAiBody(_Body):
    """What chats and completions have in common."""

    usual_temperature = 1.0

    model: Name
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Annotated[list[Stop], Field(max_length=16), BeforeValidator(_listed)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    user: str | None = None
    """Whoever asks, in the client's words; decides no token."""
    presence_penalty: Annotated[object, _only(0)] = None
    frequency_penalty: Annotated[object, _only(0)] = None
    repetition_penalty: Annotated[object, _only(1)] = None
    logit_bias: Annotated[object, _only({})] = None
    top_k: Annotated[object, _only(-1, 0)] = None
    min_p: Annotated[object, _only(0)] = None
    min_tokens: Annotated[object, _only(0)] = None
    ignore_eos: Annotated[object, _only(False)] = None

    @field_validator("stream_options")
    @classmethod
    def _is_of_a_stream(cls, value: StreamOptions | None, info: ValidationInfo) -> StreamOptions | None:
        if value is not None and not info.data.get("stream"):
            raise ValueError("is only for a stream; send stream: true too, or leave it out")
        return value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its numbers of tokens."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)


class ChatBody(_OpenAiBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[JsonObject], Field(min_length=1)]
    tools: list[JsonObject] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    metadata: JsonObject | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    prompt_cache_retention: str | None = None
    prompt_cache_options: JsonObject | None = None
    parallel_tool_calls: Annotated[object, _only(True)] = None
    response_format: Annotated[object, _only({"type": "text"})] = None
    functions: Annotated[object, _only([])] = None
    function_call: Annotated[object, _only("none")] = None
    modalities: Annotated[object, _only(["text"])] = None
    verbosity: Annotated[object, _only("medium")] = None
    reasoning_effort: Annotated[object, _only()] = None
    audio: Annotated[object, _only()] = None
    prediction: Annotated[object, _only()] = None
    moderation: Annotated[object, _only()] = None
    web_search_options: Annotated[object, _only()] = None

    @field_validator("top_logprobs")
    @classmethod
    def _is_beside_logprobs(cls, value: int | None, info: ValidationInfo) -> int | None:
        if value and not info.data.get("logprobs"):
            raise ValueError("is only beside log-probabilities; send logprobs: true too, or leave it out")
        return value

    @field_validator("max_completion_tokens")
    @classmethod
    def _is_one_bound(cls, value: int | None, info: ValidationInfo) -> int | None:
        other = info.data.get("max_tokens")
        if value is not None and other is not None and value != other:
            raise ValueError(f"is {value}, and max_tokens is {other}; send one of them")
        return value

    @field_validator("messages", "tools")
    @classmethod
    def _is_text(cls, value: list[JsonObject] | None) -> list[JsonObject] | None:
        try:
            json.dumps(value, ensure_ascii=False).encode()
        except UnicodeEncodeError:
            raise ValueError("holds half a character (a lone surrogate), which no text has") from None
        except RecursionError:
            raise ValueError("is nested too deeply") from None
        return value

    @property
    def longest(self) -> int | None:
        """Tokens of the longest answer, where the client says so."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def wanted_logprobs(self) -> int | None:
        """Likeliest tokens to tell of beside each token; None: no log-probabilities at all."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionBody(_OpenAiBody):
    """POST /v1/completions: text goes to the model as it is, without a template."""

    prompt: Annotated[list[str | list[int]], BeforeValidator(_prompts)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Annotated[object, _only(False)] = None
    best_of: Annotated[object, _only(1)] = None
    suffix: Annotated[object, _only("")] = None


class GenerateBody(_Body):
    """POST /generate: one prompt, asked as `lorafit generate` asks it."""

    usual_temperature = 0.0

    prompt: Annotated[str, StringConstraints(min_length=1)]
    model: Name | None = None
    max_new_tokens: Tokens | None = None


class FeedbackBody(_Strict):
    """POST /v1/feedback."""

    id: Name
    rating: bool
    choice: Annotated[int, Field(ge=0)] = 0


class LoadBody(_Strict):
    """POST /v1/load_lora_adapter."""

    lora_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,99}$")]
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4_096, pattern=r"^[^\x00]*$")]
    load_inplace: Annotated[object, _only(False)] = None


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    lora_name: Name
