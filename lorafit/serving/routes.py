"""What the server answers, path by path: OpenAI's, vLLM's for adapters, `/generate`, `/health` and `/metrics`."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncIterator, Callable, Coroutine
from pathlib import Path
from typing import TypeVar

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, PlainTextResponse, Response
from sse_starlette import EventSourceResponse

from lorafit.contracts import JsonObject, Sample
from lorafit.data.prompt_texts import asked_text
from lorafit.errors import DataError, UsageError
from lorafit.kinds.formats import formats
from lorafit.serving.catalog import Served
from lorafit.serving.errors import ApiError, as_api_error, client_gone, shutting_down
from lorafit.serving.forms import ChatForm, Choice, Form, TextForm
from lorafit.serving.schemas import ChatBody, CompletionBody, FeedbackBody, GenerateBody, LoadBody, UnloadBody
from lorafit.serving.service import Order, Service
from lorafit.serving.tool_calls import CallReader, writes_calls

Made = TypeVar("Made")
_PROMETHEUS = "text/plain; version=0.0.4; charset=utf-8"
_PING_SECONDS = 15  # a comment in a stream that waits, so that no proxy takes it for dead

router = APIRouter()


def _service(request: Request) -> Service:
    service: Service = request.app.state.service
    return service


@router.post("/v1/chat/completions")
async def chat(body: ChatBody, request: Request) -> Response:
    """An answer to a chat, or several."""
    service = _service(request)
    tools = body.tools if body.tool_choice != "none" else None
    service.bound(json.dumps([body.messages, tools], ensure_ascii=False), answers=body.n or 1)
    sample = _read_chat(body.messages, tools)
    served = await service.catalog.find(body.model, asked_text(sample), body.user)
    prompt = await _asked(service, served, sample)
    bounded_by = "max_completion_tokens" if body.max_completion_tokens else "max_tokens"
    order = Order(body.sampling, body.longest, body.stops, body.wanted_logprobs, body.n or 1, bounded_by=bounded_by)
    writings = service.write(served, [prompt], order)
    chats = served.voice.chats
    reads = tools and chats is not None and any(map(writes_calls, chats.templates.values()))
    choices = [Choice(writing, CallReader() if reads else None) for writing in writings]
    decode = _decoder(served) if body.wanted_logprobs is not None else None
    asked = {"prompt": body.messages, **({"tools": tools} if tools else {})}
    form = ChatForm(served.name, writings, choices, decode, asked)
    return await _reply(request, form, streams=bool(body.stream), tells_usage=body.includes_usage)


@router.post("/v1/completions")
async def complete(body: CompletionBody, request: Request) -> Response:
    """What the model writes behind a text, or behind several."""
    service = _service(request)
    texts = [one for one in body.prompt if isinstance(one, str)]
    service.bound(*texts, answers=len(body.prompt) * (body.n or 1), asked_by="prompt")
    looked_at = body.prompt if service.catalog.router is not None else []
    asked = "\n\n".join(one if isinstance(one, str) else service.catalog.text_of(one) for one in looked_at)
    served = await service.catalog.find(body.model, asked, body.user)
    prompts = [await service.read(served, one) if isinstance(one, str) else one for one in body.prompt]
    order = Order(body.sampling, body.max_tokens, body.stops, body.logprobs, body.n or 1, "prompt")
    writings = service.write(served, prompts, order)
    choices = [Choice(writing) for writing in writings]
    decode = _decoder(served) if body.logprobs is not None else None
    form = TextForm(served.name, writings, choices, len(prompts), decode)
    return await _reply(request, form, streams=bool(body.stream), tells_usage=body.includes_usage)


@router.post("/generate")
async def generate(body: GenerateBody, request: Request) -> Response:
    """An answer to one prompt, asked as `lorafit generate` asks it."""
    service = _service(request)
    service.bound(body.prompt, asked_by="prompt")
    sample = Sample("", 0, prompt=body.prompt)
    served = await service.catalog.find(body.model, asked_text(sample))
    prompt = await _asked(service, served, sample)
    order = Order(body.sampling, body.max_new_tokens, asked_by="prompt", bounded_by="max_new_tokens")
    writings = service.write(served, [prompt], order)
    form = TextForm(served.name, writings, [Choice(writings[0])], 1, None)
    await _finish(request, form)
    choice = form.choices[0]
    told = {"text": choice.text, "finish_reason": choice.finish_reason, "model": served.name, "usage": form.usage}
    return JSONResponse(told)


@router.get("/v1/models")
async def models(request: Request) -> Response:
    """The base and its adapters."""
    return JSONResponse(_service(request).catalog.listing())


@router.get("/v1/models/{name:path}")
async def model(name: str, request: Request) -> Response:
    """One of them."""
    return JSONResponse(_service(request).catalog.to_json(name))


@router.post("/v1/load_lora_adapter")
async def load_adapter(body: LoadBody, request: Request) -> Response:
    """One more adapter, where the server was started so."""
    service = _may_load(request)
    folder = Path(body.lora_path)
    with contextlib.suppress(RuntimeError):  # of `~user`, where nobody is called so
        folder = folder.expanduser()
    await _change(service, lambda: service.catalog.load(body.lora_name, folder), "lora_path")
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully.")


@router.post("/v1/unload_lora_adapter")
async def unload_adapter(body: UnloadBody, request: Request) -> Response:
    """One less, once its running requests are answered."""
    service = _may_load(request)
    await _change(service, lambda: service.catalog.unload(body.lora_name), "lora_name")
    service.metrics.forget(body.lora_name)
    return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")


@router.post("/v1/feedback")
async def rate(body: FeedbackBody, request: Request) -> Response:
    """A rating of a chat's answer, which becomes a row."""
    feedback = _service(request).feedback
    if feedback is None:
        raise ApiError(403, "this server takes no ratings; start it with --feedback FILE")
    row = feedback.rate(body.id, body.choice, body.rating)
    return JSONResponse({"id": body.id, "model": row["model"], "rating": body.rating})


@router.get("/v1/split")
async def split(request: Request) -> Response:
    """What the ratings so far tell of the split's models."""
    service = _service(request)
    if service.catalog.split is None:
        raise ApiError(404, "nothing is split here; start the server with --split a=0.9,b=0.1")
    return JSONResponse(service.catalog.split.report({} if service.feedback is None else service.feedback.ratings))


@router.get("/health")
async def health(request: Request) -> Response:
    """200 where a token was just written."""
    await _service(request).check_health()
    return JSONResponse({"status": "ok"})


@router.get("/metrics")
async def metrics(request: Request) -> Response:
    """Figures for Prometheus."""
    return Response(_service(request).metrics.text(), media_type=_PROMETHEUS)


def _may_load(request: Request) -> Service:
    service = _service(request)
    if not service.settings.allow_loading:
        raise ApiError(403, "this server loads no adapters on request; start it with --allow-loading")
    return service


async def _change(service: Service, work: Callable[[], object], param: str) -> None:
    """Loads or unloads beside the event loop. Raises ApiError with the field that is at fault."""
    try:
        await asyncio.to_thread(work)
    except Exception as error:
        param = "lora_name" if isinstance(error, UsageError) and error.key == "lora_name" else param
        raise (shutting_down() if service.is_closing else as_api_error(error, param=param)) from error


def _read_chat(messages: list[JsonObject], tools: list[JsonObject] | None) -> Sample:
    """A chat that waits for an answer, read as training reads rows of messages."""
    if messages[-1].get("role") == "assistant":
        raise ApiError(400, "the last message is the assistant's; end with one of the user or a tool", param="messages")
    try:
        return formats.get("messages").read_prompt({"messages": messages, "tools": tools}, "", 0)
    except DataError as error:
        raise ApiError(400, error.one_line, param=error.key or "messages") from error


async def _asked(service: Service, served: Served, sample: Sample) -> list[int]:
    """The prompt's tokens. Raises ApiError where the template refuses it or drops a part of it."""
    try:
        return await service.ask(served, sample)
    except DataError as error:
        raise ApiError(400, f"model '{served.name}': {error.what}", param="messages") from error


def _decoder(served: Served) -> Callable[[int], str]:
    """Text of a token alone."""
    tokenizer = served.voice.tokenizer
    return lambda number: str(tokenizer.decode([number]))


async def _reply(request: Request, form: Form, *, streams: bool, tells_usage: bool) -> Response:
    if streams:
        return EventSourceResponse(_events(request, form, tells_usage), ping=_PING_SECONDS, sep="\n")
    await _finish(request, form)
    return JSONResponse(form.whole())


async def _events(request: Request, form: Form, tells_usage: bool) -> AsyncIterator[JsonObject]:
    """The answers as server-sent events; an error in the midst of one is an event too, and the last."""

    def event(value: JsonObject) -> JsonObject:
        return {"data": json.dumps(value, ensure_ascii=False)}

    failed: ApiError | None = client_gone()  # where nothing below is reached
    try:
        async for number, piece in _service(request).follow(form.writings):
            for chunk in form.last_chunks(number) if piece is None else form.chunks(number, piece):
                yield event({**chunk, "usage": None} if tells_usage else chunk)  # null until the last, as OpenAI says
        if tells_usage:
            yield event(form.usage_chunk())
        _remember(request, form)
        failed = None
    except Exception as error:  # the status is sent: nobody else could tell
        failed = as_api_error(error)
        yield event(failed.to_json())
    finally:
        _note(request, form, failed)
    yield {"data": "[DONE]"}


async def _finish(request: Request, form: Form) -> None:
    """Has all answers written; gives them up where the client goes.

    Raises:
        ApiError: See `Service.follow`.
    """

    async def take_all() -> None:
        async for number, piece in _service(request).follow(form.writings):
            if piece is None:
                form.choices[number].end()
            else:
                form.choices[number].add(piece)

    try:
        await _unless_gone(request, take_all())
        _remember(request, form)
    finally:
        _note(request, form)


def _remember(request: Request, form: Form) -> None:
    """Keeps whole answers for their rating, where ratings are taken."""
    feedback = _service(request).feedback
    if feedback is not None and (rows := form.rows()):
        feedback.remember(form.id, rows)


def _note(request: Request, form: Form, failed: ApiError | None = None) -> None:
    """For the line in the log, and what failed once the status was sent."""
    usage = form.usage
    request.state.note = f"{form.model}, {usage['prompt_tokens']:,} + {usage['completion_tokens']:,} tokens"
    if failed is not None:
        request.state.note += f", ended by {failed.status}, {failed.note}"
        request.state.failed = failed.status


async def _unless_gone(request: Request, work: Coroutine[None, None, Made]) -> Made:
    """What the work gives; it is cancelled where the client hangs up first."""
    working, leaving = asyncio.create_task(work), asyncio.create_task(_until_gone(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise client_gone()
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _until_gone(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
