"""What a client is told when its request cannot be answered: OpenAI's form, with the HTTP status that belongs to it.

{"error": {"message": "...", "type": "invalid_request_error", "param": "messages", "code": null}}
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from lorafit.console.exits import bug, explain
from lorafit.console.nearest import did_you_mean
from lorafit.contracts import JsonObject
from lorafit.errors import CheckpointError, DataError, LorafitError, ModelError, QueueFull, SafetyError, UsageError

_TYPES = {401: "authentication_error", 429: "rate_limit_error"}
_USERS = (UsageError, DataError, ModelError, CheckpointError, SafetyError)
_RETRY_SECONDS = 1

_PLAIN = {
    "too_short": "is an empty list; send at least {min_length}",
    "too_long": "has more than {max_length} entries; send fewer",
    "string_too_short": "is an empty text",
    "string_too_long": "is longer than {max_length:,} characters",
    "string_pattern_mismatch": "does not match {pattern}",
    "greater_than_equal": "is less than {ge:g}, the least that is taken",
    "less_than_equal": "is more than {le:g}, the most that is taken",
    "finite_number": "is no finite number",
    "int_type": "is no whole number",
    "float_type": "is no number",
    "bool_type": "is neither true nor false",
    "string_type": "is no text",
    "list_type": "is no list",
    "dict_type": "is no JSON object",
    "model_type": "is no JSON object",
    "model_attributes_type": "is no JSON object",
    "literal_error": "is none of {expected}",
}
"""What is told by pydantic's kinds of errors, whose own words speak of Python."""


class ApiError(Exception):
    """An answer that says why there is none.

    Args:
        status: HTTP's.
        message: What is wrong and what to do.
        param: The field of the request that it is about.
        code: A word that programs can go by.
        retry_seconds: When to ask again; None: there is no use.
    """

    def __init__(
        self,
        status: int,
        message: str,
        *,
        param: str | None = None,
        code: str | None = None,
        retry_seconds: int | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code = status, message, param, code
        self.headers: dict[str, str] = {} if retry_seconds is None else {"Retry-After": str(retry_seconds)}

    @property
    def note(self) -> str:
        """For the line in the log."""
        message = " ".join(self.message.split())
        return f"{self.code}: {message[:120]}" if self.code else message[:120]

    def to_json(self) -> JsonObject:
        """The body."""
        kind = _TYPES.get(self.status, "server_error" if self.status >= 500 else "invalid_request_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


def shutting_down() -> ApiError:
    """What a request gets that comes while the server ends, or outlasts its grace."""
    return ApiError(503, "the server is shutting down", code="shutting_down", retry_seconds=_RETRY_SECONDS)


def client_gone() -> ApiError:
    """What the log says of a request whose client hung up, with nginx's code; nobody is there to read it."""
    return ApiError(499, "the client hung up")


def unknown_model(name: str, known: Sequence[str], param: str = "model") -> ApiError:
    """What a request for a model gets that is not served; `param`: the field that names it."""
    message = f"no model is called '{name[:80]}'; {did_you_mean(name[:80], known)}served: {', '.join(known)}"
    return ApiError(404, message, param=param, code="model_not_found")


def unreadable() -> ApiError:
    """What a body gets that cannot be parsed."""
    return ApiError(400, "the body is no JSON in UTF-8, or is nested too deeply; send a JSON object")


def as_api_error(error: Exception, *, param: str | None = None) -> ApiError:
    """Any error as a client is told of it; one of our own is written to a file first, as on the command line.

    `param`: the field that is at fault where the client is.
    """
    if isinstance(error, ApiError):
        return error
    if isinstance(error, RecursionError):  # of what a client has nested: nothing else here goes so deep
        return unreadable()
    if isinstance(error, QueueFull):
        return ApiError(429, error.one_line, code="rate_limit_exceeded", retry_seconds=_RETRY_SECONDS)
    if isinstance(error, _USERS):
        return ApiError(400, error.one_line, param=param)
    told = error if isinstance(error, LorafitError) else explain(error, "serve") or bug(error)
    return ApiError(400 if param is not None and isinstance(told, _USERS) else 500, told.one_line, param=param)


def of_validation(found: Sequence[Mapping[str, object]], known: Sequence[str]) -> ApiError:
    """The first thing that pydantic found wrong in a body, with its field. `known`: the fields that there are."""
    first = found[0]
    place = first.get("loc", ())
    names = [str(part) for part in place if part != "body"] if isinstance(place, list | tuple) else []
    param = ".".join(names) or None
    kind, given = str(first["type"]), first.get("ctx")
    message = str(first["msg"]).removeprefix("Value error, ")
    if kind in _PLAIN:
        message = _PLAIN[kind].format_map(given if isinstance(given, dict) else {})
    if kind == "json_invalid":
        return unreadable()
    if kind == "missing" and param is None:
        return ApiError(400, "the body is empty; send a JSON object with Content-Type: application/json")
    if kind == "missing":
        return ApiError(400, f"{param}: is missing", param=param, code="missing_required_parameter")
    if kind == "extra_forbidden":
        meant = did_you_mean(str(param)[:80], known).rstrip()
        what = f"{param}: this server knows no such parameter{meant and f'; {meant}'}"
        return ApiError(400, what, param=param, code="unknown_parameter")
    if param is None:
        return ApiError(400, "the body is no JSON object; send one with Content-Type: application/json")
    return ApiError(400, f"{param}: {message[:1].lower()}{message[1:]}", param=param)
