"""Tiny random encoder-decoders of several families, their tokenizer, and a recipe that trains one within a second."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tests.support import tiny_recipe
from tests.support.tiny_model import WORDS
from tests.support.tiny_recipe import make_rows, write_rows

FAMILIES = ("t5", "bart", "mbart", "pegasus", "marian", "encoder-decoder")
_LETTERS = "abcdefghijklmnopqrstuvwxyz0123456789:. "


def make_tokenizer() -> Any:
    """A small BPE tokenizer that ends every text, as T5's does: pad is 0, the end 1."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=128,
        special_tokens=["<pad>", "</s>", "<unk>"],
        initial_alphabet=[*_LETTERS, "▁"],
        show_progress=False,
    )
    tokenizer.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_letter_tokenizer(letters: str) -> Any:
    """A token a letter, with blanks between them, and an end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    known = {token: number for number, token in enumerate(["<pad>", "</s>", "<unk>", *letters])}
    tokenizer = Tokenizer(models.WordLevel(known, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def make_marian_base(folder: Path, lines: dict[str, list[str]]) -> Path:
    """A folder with a tiny Marian and its own class of tokenizer: two SentencePiece models, one list of their pieces.

    Args:
        folder: Where; made.
        lines: Texts that each model is trained on, of `source` and `target`.
    """
    import sentencepiece
    from transformers import MarianTokenizer

    folder.mkdir()
    pieces = ["</s>", "<unk>"]
    for side, texts in lines.items():
        options = {"vocab_size": 64, "hard_vocab_limit": False, "minloglevel": 2}
        prefix = str(folder / side)
        sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(texts), model_prefix=prefix, **options)
        (folder / f"{side}.model").rename(folder / f"{side}.spm")
        model = sentencepiece.SentencePieceProcessor(model_file=str(folder / f"{side}.spm"))
        pieces += [model.id_to_piece(number) for number in range(model.get_piece_size())]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys([*pieces, "<pad>"]))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary), encoding="utf-8")
    files = [str(folder / name) for name in ("source.spm", "target.spm", "vocab.json")]
    MarianTokenizer(*files, source_lang="en", target_lang="de").save_pretrained(folder)
    pad = vocabulary["<pad>"]
    ids = {"pad_token_id": pad, "decoder_start_token_id": pad, "eos_token_id": 0, "forced_eos_token_id": 0}
    tiny_seq2seq("marian", vocab_size=len(vocabulary), max_position_embeddings=512, **ids).save_pretrained(folder)
    return folder


def make_language_tokenizer() -> Any:
    """mBART's own class, which writes a text's language behind it."""
    from transformers import MBartTokenizer

    special = ["<s>", "<pad>", "</s>", "<unk>"]
    return MBartTokenizer(
        vocab=[(token, 0.0) for token in special] + [(letter, -1.0) for letter in f"▁{_LETTERS[:-1]}"]
    )


def tiny_seq2seq(family: str, *, seed: int = 0, vocab_size: int = 128, **changes: Any) -> Any:
    """A random model of 2 layers a side and a width of 64, without dropout."""
    import torch
    import transformers as library

    torch.manual_seed(seed)
    ends: dict[str, Any] = {"pad_token_id": 0, "eos_token_id": 1, "bos_token_id": None}
    if family in ("t5", "mt5", "umt5"):
        name = {"t5": "T5", "mt5": "MT5", "umt5": "UMT5"}[family]
        sizes = {"d_model": 64, "d_ff": 128, "d_kv": 16, "num_layers": 2, "num_heads": 4, "dropout_rate": 0.0}
        config = getattr(library, f"{name}Config")(
            **{"vocab_size": vocab_size, "decoder_start_token_id": 0, **ends, **sizes, **changes}
        )
        return getattr(library, f"{name}ForConditionalGeneration")(config)
    if family == "encoder-decoder":
        sizes = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
        off = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0, "max_position_embeddings": 64}
        halves = [library.BertConfig(vocab_size=vocab_size, pad_token_id=0, **sizes, **off) for _ in range(2)]
        both = library.EncoderDecoderConfig.from_encoder_decoder_configs(*halves)
        both.decoder_start_token_id, both.pad_token_id, both.eos_token_id = 2, 0, 1
        return library.EncoderDecoderModel(config=both)
    name = {"bart": "Bart", "mbart": "MBart", "pegasus": "Pegasus", "marian": "Marian", "m2m_100": "M2M100"}[family]
    sides = {
        f"{side}_{what}": size
        for side in ("encoder", "decoder")
        for what, size in (("layers", 2), ("attention_heads", 4), ("ffn_dim", 128))
    }
    off = {"dropout": 0.0, "attention_dropout": 0.0, "activation_dropout": 0.0}
    config = getattr(library, f"{name}Config")(
        **{
            "vocab_size": vocab_size,
            "d_model": 64,
            "max_position_embeddings": 64,
            "decoder_start_token_id": 1 if family == "bart" else 0,
            "forced_eos_token_id": 1,
            **ends,
            **sides,
            **off,
            **changes,
        }
    )
    model = (
        library.MarianMTModel(config)
        if family == "marian"
        else getattr(library, f"{name}ForConditionalGeneration")(config)
    )
    if hasattr(model, "final_logits_bias"):
        torch.nn.init.normal_(model.final_logits_bias)  # as a trained Marian has one
    return model


def make_base(folder: Path, family: str = "t5", **changes: Any) -> Path:
    """A folder with such a model and its tokenizer."""
    tokenizer = make_tokenizer()
    tiny_seq2seq(family, vocab_size=len(tokenizer), **changes).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def make_texts(count: int, *, first: int = 0) -> list[dict[str, Any]]:
    """Sources with targets, of different lengths."""
    return [{"source": row["question"], "target": row["answer"]} for row in make_rows(count, first=first)]


def make_recipe(folder: Path, **sections: Any) -> Path:
    """A recipe in `folder` over `base/` beside it; keyword arguments replace keys of its sections."""
    own: dict[str, Any] = {
        "task": {"kind": "seq2seq-lm", "max_target_length": 48},
        "data": {"max_length": 64},
        "evaluation": {"final": ["perplexity"]},
    }
    for section, changes in sections.items():
        own[section] = {**own.get(section, {}), **changes} if isinstance(changes, dict) else changes
    recipe = tiny_recipe.make_recipe(folder, **own)
    write_rows(folder / "train.jsonl", make_texts(24))
    write_rows(folder / "valid.jsonl", make_texts(4, first=100))
    write_rows(folder / "test.jsonl", make_texts(6, first=200))
    return recipe
