"""A tiny random BERT with a tokenizer of letters, in the form of a sentence encoder's folder."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make_encoder(folder: Path, pooling: dict[str, Any] | None = None) -> Path:
    """The folder; `pooling` is written as sentence-transformers does, nothing where None."""
    import torch
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    marks = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = [chr(code) for code in range(97, 123)]
    raw = Tokenizer(models.WordLevel({token: place for place, token in enumerate([*marks, *letters])}, "[UNK]"))
    raw.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    raw.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, pad_token="[PAD]", unk_token="[UNK]", model_max_length=32)
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    model = BertModel(BertConfig(vocab_size=len(tokenizer), max_position_embeddings=64, pad_token_id=0, **sizes))
    for parameter in model.parameters():
        if parameter.ndim == 2:
            torch.nn.init.normal_(parameter, std=0.5)  # else all texts are all but one point
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    if pooling is not None:
        parts = [{"path": "", "type": "st.Transformer"}, {"path": "1_Pooling", "type": "st.Pooling"}]
        (folder / "modules.json").write_text(json.dumps(parts))
        (folder / "1_Pooling").mkdir()
        (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling))
    return folder
