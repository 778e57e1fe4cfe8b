"""Bodies of requests, in OpenAI's forms. A field that would change an answer and is not served is refused by name."""

from __future__ import annotations

import json
import secrets
from typing import Annotated, ClassVar, Literal, TypeAlias

from pydantic import BaseModel, ConfigDict, Field, StrictBool, StringConstraints, field_validator

from lorafit.answering.sampling import Sampling
from lorafit.contracts import JsonObject

MOST_CHOICES = 16
_LEAST_TOP_P = 0.001

Name: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=200)]
Stop: TypeAlias = Annotated[str, StringConstraints(min_length=1, max_length=1_000)]
Tokens: TypeAlias = Annotated[int, Field(ge=1)]
Ids: TypeAlias = Annotated[list[Annotated[int, Field(ge=0, lt=1 << 31)]], Field(min_length=1)]


class _Body(BaseModel):
    """What every request may say of how its answer is written."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    usual_temperature: ClassVar[float]

    temperature: float | None = Field(default=None, ge=0, le=10)
    top_p: float | None = Field(default=None, ge=0, le=1)
    seed: int | None = None

    def sampling(self, longest: int) -> Sampling:
        """How the tokens of an answer are chosen; without a seed each time anew."""
        temperature = self.usual_temperature if self.temperature is None else self.temperature
        top_p = 1.0 if self.top_p is None or temperature == 0 else max(self.top_p, _LEAST_TOP_P)
        seed = secrets.randbits(32) if self.seed is None else self.seed % (1 << 63)
        return Sampling(longest, temperature, top_p, seed)


class StreamOptions(BaseModel):
    """Of a stream."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    include_usage: bool = False


class ResponseFormat(BaseModel):
    """The form of an answer; only text is served."""

    type: Literal["text"]


class _OpenAiBody(_Body):
    """What chats and completions have in common."""

    usual_temperature = 1.0

    model: Name
    n: int | None = Field(default=None, ge=1, le=MOST_CHOICES)
    stop: Stop | Annotated[list[Stop], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    max_tokens: Tokens | None = None
    presence_penalty: Literal[0] | None = None
    frequency_penalty: Literal[0] | None = None
    logit_bias: Annotated[dict[str, float], Field(max_length=0)] | None = None
    user: str | None = None
    """Whoever asks, in the client's words; decides no token."""

    @field_validator("presence_penalty", "frequency_penalty", mode="before")
    @classmethod
    def _is_zero(cls, value: object) -> object:
        return int(value) if value == 0.0 and isinstance(value, float) else value

    @property
    def stops(self) -> tuple[str, ...]:
        """Texts that end an answer."""
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def includes_usage(self) -> bool:
        """Whether a stream ends with its numbers of tokens."""
        return self.stream_options is not None and self.stream_options.include_usage


class ChatBody(_OpenAiBody):
    """POST /v1/chat/completions."""

    messages: Annotated[list[JsonObject], Field(min_length=1)]
    tools: list[JsonObject] | None = None
    tool_choice: Literal["auto", "none"] | None = None
    parallel_tool_calls: Literal[True] | None = None
    max_completion_tokens: Tokens | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    response_format: ResponseFormat | None = None
    metadata: JsonObject | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None

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

    prompt: str | Ids | Annotated[list[str], Field(min_length=1)] | Annotated[list[Ids], Field(min_length=1)]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: Literal[False] | None = None
    best_of: Literal[1] | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """Each prompt, a text or token ids."""
        if isinstance(self.prompt, str):
            return [self.prompt]
        one = [part for part in self.prompt if isinstance(part, int)]
        return [one] if one else [part for part in self.prompt if not isinstance(part, int)]


class GenerateBody(_Body):
    """POST /generate: one prompt, asked as `lorafit generate` asks it."""

    usual_temperature = 0.0

    prompt: Annotated[str, StringConstraints(min_length=1)]
    model: Name | None = None
    max_new_tokens: Tokens | None = None


class FeedbackBody(BaseModel):
    """POST /v1/feedback."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    id: Name
    rating: StrictBool
    choice: Annotated[int, Field(ge=0)] = 0


class LoadBody(BaseModel):
    """POST /v1/load_lora_adapter."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    lora_name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._/:-]{0,99}$")]
    lora_path: Annotated[str, StringConstraints(min_length=1, max_length=4_096, pattern=r"^[^\x00]*$")]


class UnloadBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    model_config = ConfigDict(extra="ignore", frozen=True)
    lora_name: Name
