"""New tokens: a tokenizer that knows more words, rows for them in a model, and what an adapter keeps of both.

    tokenizer    <call> gets the next free id
    embedding    [rows, hidden] gets rows up to that id; so does an output head that is a matrix of its own
                 a new row begins as the mean of all known ones, or of the tokens of a text that says what it means
    adapter      holds the trained rows alone: [new tokens, hidden]

A base is given its new tokens where a recipe or a run's card is opened; from then on its tokenizer and its model have
them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.console.wording import list_names
from lorafit.contracts import JsonObject
from lorafit.errors import RecipeError
from lorafit.facts import ModelShape
from lorafit.files.atomic import atomic_dir
from lorafit.files.cache import cache_folder
from lorafit.kinds.linear_targets import KEY_OF_NEW_TOKENS, new_tokens
from lorafit.model.names import names_of
from lorafit.model.quiet import quiet_libraries

if TYPE_CHECKING:
    from peft import PeftConfig, PeftModel
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from lorafit.kinds.adapters import AdapterSection

_KEPT_AT = "_lorafit_new_rows"
_HINT = "load this folder's tokenizer and resize_token_embeddings(len(tokenizer)) of the base, then load the adapter"


def add_tokens(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> None:
    """Teaches a tokenizer tokens; they are no control tokens: whoever writes one in a row means it.

    Raises:
        RecipeError: It knows one already.
    """
    from tokenizers import AddedToken

    vocabulary = tokenizer.get_vocab()
    known = [token for token in tokens if token in vocabulary]
    if known:
        what = f"the base's tokenizer has {list_names(map(repr, known))} already"
        raise RecipeError(what, key=KEY_OF_NEW_TOKENS, todo="leave it out: rows may use it as it is")
    tokenizer.add_tokens([AddedToken(token, normalized=False, special=False) for token in tokens])


def row_ids(tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> list[int]:
    """Ids of tokens that a tokenizer was taught."""
    found: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return found


def with_rows(shape: ModelShape, section: AdapterSection, tokenizer: PreTrainedTokenizerBase) -> ModelShape:
    """The shape of a model with rows for a recipe's new tokens."""
    tokens = new_tokens(section)
    rows = max(shape.vocabulary, *(number + 1 for number in row_ids(tokenizer, tokens))) if tokens else 0
    if rows <= shape.vocabulary:
        return shape
    sizes = {
        name: getattr(shape, name) // shape.vocabulary * rows for name in ("embedding_parameters", "head_parameters")
    }
    return replace(shape, vocabulary=rows, **sizes)


def grow_rows(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, tokens: Mapping[str, str]) -> None:
    """Gives a loaded model rows for the new tokens of its tokenizer.

    Args:
        model: The base.
        tokenizer: Its own, taught the tokens.
        tokens: Each with the text that its row begins with the mean of; empty: of all known tokens.
    """
    import torch

    ids, known = row_ids(tokenizer, tokens), len(tokenizer) - len(tokens)
    if max(ids) >= model.get_input_embeddings().weight.shape[0]:
        model.resize_token_embeddings(max(ids) + 1, mean_resizing=False)
    matrices = {id(module.weight): module.weight for module in _matrices(model).values()}
    with torch.no_grad():
        for weight in matrices.values():
            mean = weight[:known].mean(dim=0, dtype=torch.float32)
            for number, text in zip(ids, tokens.values(), strict=True):
                told = [one for one in tokenizer(text, add_special_tokens=False).input_ids if one < known]
                weight[number] = weight[told].float().mean(dim=0) if told else mean
    setattr(model, _KEPT_AT, ids)


def ask_for_rows(config: PeftConfig, model: PreTrainedModel | PeftModel, section: AdapterSection) -> None:
    """Writes into PEFT's config which rows are trained.

    Raises:
        RecipeError: The embedding is trained whole, or the model's head has a bias, which PEFT would drop.
    """
    tokens = new_tokens(section)
    if not tokens:
        return
    matrices = _matrices(model)
    whole = [path for path in matrices if path in (config.modules_to_save or ())]
    if whole:
        what = f"adapter.modules_to_save trains '{whole[0]}' whole, with every row"
        raise RecipeError(what, key=KEY_OF_NEW_TOKENS, todo="leave the embedding and the head out there")
    if any(getattr(module, "bias", None) is not None for module in matrices.values()):
        what = f"the output head of {type(model).__name__} has a bias, which PEFT drops beside trained rows"
        raise RecipeError(what, key=KEY_OF_NEW_TOKENS, todo="use another base model")
    weights = {id(module.weight): path for path, module in reversed(matrices.items())}
    rows = next(iter(matrices.values())).weight.shape[0]  # without a tokenizer, as in an estimate: any will do
    ids: Sequence[int] = getattr(model, _KEPT_AT, range(rows - len(tokens), rows))
    config.trainable_token_indices = {path: [*ids] for path in reversed(weights.values())}


def keep_tokenizer(tokenizer: PreTrainedTokenizerBase, digest: str) -> Path:
    """A folder of the cache with the files of a tokenizer that was taught tokens.

    Args:
        tokenizer: The tokenizer.
        digest: Of what it does.
    """
    folder = cache_folder() / "tokenizers" / digest
    if not folder.is_dir():
        with atomic_dir(folder) as temporary, quiet_libraries():
            tokenizer.save_pretrained(temporary)
    return folder


def note_rows(model: PeftModel) -> JsonObject:
    """What an adapter notes of the rows that it holds; nothing where there are none."""
    base, names = model.get_base_model(), names_of(model)
    found, ids, again = {}, list[int](), list[str]()
    for path, module in base.named_modules():
        if not hasattr(module, "trainable_tokens_delta"):
            continue
        own = f"{path.removesuffix('.token_adapter')}.weight"
        files = (own,) if names is None else names.files_of(own)
        if module.tied_adapter is not None:
            again += files
        else:
            found[f"{path}.trainable_tokens_delta"] = files[0]
            ids = [*next(iter(module.token_indices.values()))]
    return {"rows": {"hint": _HINT, "ids": ids, "tensors": found, "tied": again}} if found else {}


def _matrices(model: Any) -> dict[str, Any]:
    """Embedding, and the output head where there is one, by path."""
    wanted = [module for module in (model.get_input_embeddings(), model.get_output_embeddings()) if module is not None]
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: module for module in wanted}
