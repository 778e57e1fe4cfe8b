"""Answers to many prompts: batched through transformers' `generate`, alike in any batch, however tokens are chosen.

    prompts, longest first          [P P P P P P P | . . .]     left padding, so that every row's next token
    rows of one batch               [_ _ P P P P P | . . .]     stands in the same column; the mask hides
    rows x (prompt + new) <= budget [_ _ _ P P P P | . . .]     the padding, positions count from its end

A batch is written in rounds: when half of its rows have ended, the others go on without them, with their cache. One
that is searched with beams is written in one.

An encoder-decoder reads its prompts padded on the right, as in training; its answers begin in the first column.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import torch

from lorafit.answering.plain_generation import head_sees_last, plain_generation, room_of
from lorafit.answering.sampling import GREEDY, Sampling, build_processors
from lorafit.contracts import GenerationRow, JsonObject, Reporter
from lorafit.errors import ModelError, ResourceError, UsageError
from lorafit.ops.process_memory import is_out_of_memory, run_or_halve
from lorafit.ops.virtual_tokens import count_virtual_tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase
    from transformers.generation.streamers import BaseStreamer

    from lorafit.pictures import PictureReader, PlacedPicture

_BATCH_TOKENS = 16_384
"""Bound of rows x (prompt + new tokens) in one batch: 2 GiB of keys and values for Llama-3.1-8B in bf16."""
_BATCH_ROWS = 64
LEAST_ROUND_ROWS = 4
"""Below this many rows it is not worth ending a round to drop those that have ended."""


@dataclass(frozen=True, slots=True)
class Request:
    """One prompt for an Engine.

    Attributes:
        prompt_ids: Token ids, generation prompt included.
        adapter: Name of the adapter that answers; None: the base model alone.
        sampling: How tokens are chosen.
        stop_ids: Tokens that end the answer, beside the model's own.
        row: Number that, with the seed, decides the noise of sampled tokens: a request draws the same alone and in any
            batch.
        pictures: The prompt's images.
    """

    prompt_ids: Sequence[int]
    adapter: str | None = None
    sampling: Sampling = GREEDY
    stop_ids: tuple[int, ...] = ()
    row: int = 0
    pictures: tuple[PlacedPicture, ...] = ()

    @classmethod
    def of_row(cls, row: GenerationRow, adapter: str | None, sampling: Sampling, stop_ids: Sequence[int]) -> Request:
        """Of a held-out row."""
        return cls(row.prompt_ids, adapter, sampling, tuple(stop_ids), pictures=row.pictures)


@dataclass(frozen=True, slots=True)
class Answer:
    """What the model wrote.

    Attributes:
        text: The answer without control tokens.
        tokens: Tokens generated, the one that ended it included.
        seconds: This row's share of its batch's time.
        ended: `stop`: by an end-of-turn token. `length`: cut at max_new_tokens or at the model's last position.
            `no_room`: the prompt already fills the model's positions, nothing was generated.
        written: The answer with its control tokens, but for the one that ended it.
    """

    text: str
    tokens: int
    seconds: float
    ended: Literal["stop", "length", "no_room"]
    written: str = ""


def generate_answers(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    requests: Sequence[Request],
    *,
    batch_rows: int = _BATCH_ROWS,
    reporter: Reporter,
    what: str = "answers",
    streamer: BaseStreamer | None = None,
    reader: PictureReader | None = None,
) -> list[Answer]:
    """Answers in the requests' order. Leaves the model's mode, configuration and the random numbers to the caller.

    Args:
        model: A transformers model that writes, or a PeftModel around one, in eval mode.
        tokenizer: Decodes; knows the pad and end tokens.
        requests: All with the same sampling and stop tokens; what their adapter is called is not looked at.
        batch_rows: Bound of rows in a batch.
        reporter: Gets a bar and warnings.
        what: Name of the bar.
        streamer: transformers' own, of one request: gets the prompt, and each token as it is written.
        reader: Makes tensors of the requests' images; None where they have none.

    Raises:
        UsageError: Beams for prompts with images, which transformers would give to other rows.
        ResourceError: Not even one row fits into memory.
    """
    sampling, stops = requests[0].sampling, find_stop_ids(model, tokenizer, requests[0].stop_ids)
    begins_with, longest = count_virtual_tokens(model), sampling.max_new_tokens
    if sampling.num_beams > 1 and any(request.pictures for request in requests):
        todo = "search with one beam"
        raise UsageError("no beams are searched for prompts with images", key="num_beams", todo=todo)
    first = tokenizer.bos_token_id if tokenizer.bos_token_id is not None else stops[0] if stops else 0
    prompts = [
        list(request.prompt_ids) or [int(first)] for request in requests
    ]  # a model needs one token to go on from
    rooms = [room_of(model, begins_with + len(prompt), longest) for prompt in prompts]
    answers: list[Answer | None] = [None if room > 0 else Answer("", 0, 0.0, "no_room") for room in rooms]
    if full := sum(room <= 0 for room in rooms):
        reporter.warn(f"{full} of {len(prompts)} prompts fill the model's positions and got no answer")
    writer, lengths = _Writer(model, tokenizer, stops, sampling, streamer, reader), [len(prompt) for prompt in prompts]
    tokens, rows = _BATCH_TOKENS // sampling.num_beams, max(1, batch_rows // sampling.num_beams)
    waiting = cut_prompts(lengths, rooms, batch_tokens=tokens, batch_rows=rows, pads=begins_with == 0)
    whole = reporter.track(sum(map(len, waiting)), what)

    def write(places: Sequence[int]) -> list[Answer]:
        rows = [requests[place].row for place in places]
        pictures = [requests[place].pictures for place in places]
        return writer.write(rows, [prompts[place] for place in places], rooms[places[0]], pictures)

    with torch.no_grad(), plain_generation(model, stops), head_sees_last(model), whole as bar:
        try:
            for places, written in run_or_halve(write, waiting, model.device):
                for place, answer in zip(places, written, strict=True):
                    answers[place] = answer
                bar.advance(len(places))
        except ValueError as error:
            if "beam search" not in str(error):
                raise
            what = f"{type(model).__name__} cannot be searched with beams: its cache cannot be put in another order"
            raise ModelError(what, key="evaluation.num_beams", todo="write num_beams: 1") from error
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            todo = "lower evaluation.max_new_tokens or free the device"
            raise ResourceError("out of memory while generating one answer", todo=todo) from error
    return [answer for answer in answers if answer is not None]


def cut_prompts(
    lengths: Sequence[int], rooms: Sequence[int], *, batch_tokens: int, batch_rows: int, pads: bool = True
) -> list[list[int]]:
    """Row numbers of each batch, longest prompts first, so that padding is small and too little memory shows at once.

    Rows of a batch have the same room for new tokens: a model with learnt positions fails beyond its last one.
    Rows without room are left out.

    Args:
        lengths: Tokens of each prompt.
        rooms: New tokens that each row may get.
        batch_tokens: Bound of rows x (longest prompt + new tokens); a single row may exceed it.
        batch_rows: Bound of rows.
        pads: Whether prompts of several lengths may share a batch: not where vectors stand before the padding.
    """
    order = sorted((row for row in range(len(lengths)) if rooms[row] > 0), key=lambda row: (rooms[row], -lengths[row]))
    batches: list[list[int]] = []
    for row in order:
        last = batches[-1] if batches else []
        fits = bool(last) and rooms[last[0]] == rooms[row] and (pads or lengths[last[0]] == lengths[row])
        if fits and len(last) < batch_rows and (len(last) + 1) * (lengths[last[0]] + rooms[row]) <= batch_tokens:
            last.append(row)
        else:
            batches.append([row])
    return batches


def find_stop_ids(model: torch.nn.Module, tokenizer: PreTrainedTokenizerBase, stop_ids: Sequence[int]) -> list[int]:
    """Every token that ends an answer: those given, those of the model's generation config, the tokenizer's eos."""
    configured = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    listed = configured if isinstance(configured, list) else [configured]
    return sorted({int(token) for token in [*stop_ids, *listed, tokenizer.eos_token_id] if token is not None})


class _HalfEnded:
    """Stopping criterion: ends a round once half of its rows have ended, so that the others go on without them."""

    def __init__(self, stops: torch.Tensor) -> None:
        self._stops = stops

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """One value for all rows, `[batch]`. Rows that ended go on with padding, which is itself a stop token."""
        ended = torch.isin(input_ids[:, -1], self._stops)
        return (ended.float().mean() >= 0.5).expand(len(input_ids))


def _keep_rows(cache: Any, index: torch.Tensor, columns: int) -> Any:
    """The cache with some of its rows; None where it cannot be cut, and the next round reads its prompts again."""
    if not hasattr(cache, "batch_select_indices") or cache.get_seq_length() != columns - 1:
        return None
    cache.batch_select_indices(index)
    return cache


@dataclass(frozen=True, slots=True)
class _Writer:
    """Runs one batch."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    stops: list[int]
    sampling: Sampling
    streamer: BaseStreamer | None
    reader: PictureReader | None = None

    def write(
        self,
        rows: Sequence[int],
        prompts: Sequence[list[int]],
        room: int,
        pictures: Sequence[Sequence[PlacedPicture]],
    ) -> list[Answer]:
        """The answers of one batch, in rounds: rows that have ended are dropped at the end of each.

        Args:
            rows: The prompts' numbers, which seed their noise.
            prompts: Token ids.
            room: New tokens of the longest answer.
            pictures: Each prompt's images.
        """
        started = time.perf_counter()
        inputs, start = self._pad(prompts)
        columns, going = start, list(range(len(prompts)))
        written: list[list[int]] = [[] for _ in prompts]
        while going:
            seen = [] if "past_key_values" in inputs else [one for place in going for one in pictures[place]]
            output = self.model.generate(
                **inputs,
                **self._look(seen),
                **self.sampling.search(),
                max_new_tokens=room - (columns - start),
                min_new_tokens=max(0, min(self.sampling.min_new_tokens, room) - (columns - start)) or None,
                use_cache=True,
                return_dict_in_generate=True,
                logits_processor=build_processors(self.sampling, [rows[place] for place in going], start),
                stopping_criteria=self._criteria(len(going)),
                streamer=self.streamer,
            )
            for place, tokens in zip(going, output.sequences[:, start:].tolist(), strict=True):
                written[place] = tokens
            columns = output.sequences.shape[1]
            left = [i for i, place in enumerate(going) if not set(self.stops) & set(written[place])]
            if columns - start >= room or not left:
                break
            inputs, going = self._go_on(inputs, output, left), [going[i] for i in left]
        seconds = (time.perf_counter() - started) / len(prompts)
        return [self._read(tokens, seconds) for tokens in written]

    def _look(self, pictures: Sequence[PlacedPicture]) -> JsonObject:
        """What the model takes of images, in the order of the rows; nothing where there are none."""
        if not pictures:
            return {}
        assert self.reader is not None, "whoever opens prompts with images has what reads them"
        device = self.model.get_input_embeddings().weight.device
        return {name: values.to(device) for name, values in self.reader.read(pictures).items()}

    def _pad(self, prompts: Sequence[list[int]]) -> tuple[JsonObject, int]:
        """Ids and mask, `[batch, columns]`, and the column of the first new token.

        Known by length: the pad token may be a real one.
        """
        pad, columns = self.stops[0] if self.stops else 0, max(map(len, prompts))
        reads_alone = self.model.config.is_encoder_decoder
        ids, mask = list[list[int]](), list[list[int]]()
        for prompt in prompts:
            fill, ones = [pad] * (columns - len(prompt)), [1] * len(prompt)
            ids.append([*prompt, *fill] if reads_alone else [*fill, *prompt])
            mask.append([*ones, *[0] * len(fill)] if reads_alone else [*[0] * len(fill), *ones])
        device = self.model.get_input_embeddings().weight.device
        inputs = {"input_ids": torch.tensor(ids, device=device), "attention_mask": torch.tensor(mask, device=device)}
        return inputs, 1 if reads_alone else columns  # the token that an encoder-decoder's answers begin with

    def _go_on(self, inputs: JsonObject, output: Any, left: Sequence[int]) -> JsonObject:
        """What the next round gets: the rows that are left with what they have written."""
        index = torch.tensor(left, device=output.sequences.device)
        cache, sequences = _keep_rows(output.past_key_values, index, output.sequences.shape[1]), output.sequences[index]
        kept: JsonObject = {} if cache is None else {"past_key_values": cache}
        mask = inputs["attention_mask"][index]
        if self.model.config.is_encoder_decoder:
            kept |= {"decoder_input_ids": sequences, "decoder_attention_mask": torch.ones_like(sequences)}
            return {"input_ids": inputs["input_ids"][index], "attention_mask": mask, **kept}
        mask = torch.nn.functional.pad(mask, (0, sequences.shape[1] - mask.shape[1]), value=1)
        return {"input_ids": sequences, "attention_mask": mask, **kept}

    def _criteria(self, rows: int) -> Any:
        from transformers import StoppingCriteriaList

        worth_it = self.stops and rows >= LEAST_ROUND_ROWS and self.sampling.num_beams == 1
        device = self.model.get_input_embeddings().weight.device
        rounds = [_HalfEnded(torch.tensor(self.stops, device=device))] if worth_it else []
        return StoppingCriteriaList(rounds)

    def _read(self, tokens: list[int], seconds: float) -> Answer:
        """Cuts behind the first stop token, which the rest of a batch goes on past with padding."""
        stops = set(self.stops)
        end = next((place for place, token in enumerate(tokens) if token in stops), None)
        kept = tokens if end is None else tokens[:end]
        text, written = (
            self.tokenizer.decode(kept, skip_special_tokens=skips, clean_up_tokenization_spaces=False)
            for skips in (True, False)
        )
        count = len(tokens) if end is None else end + 1
        return Answer(text, count, seconds, "length" if end is None else "stop", written)
