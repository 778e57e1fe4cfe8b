"""Two encoders as an encoder-decoder that learns to sum up, held against the first sentence of each text.

    python benchmarks/summaries.py MODEL DATA [--rows N] [--test-rows N] [--epochs N] [--learning-rate X] [--runs DIR]

MODEL is a folder with a BERT-like encoder, DATA a folder with train.jsonl and test.jsonl (source, target). The base is
transformers' EncoderDecoderModel of the encoder twice. A decoder needs what the encoder lacks: each cross-attention
begins as a copy of the self-attention beside it, the dense layer of the head as the identity, and the head's rows are
the embeddings. All of that is frozen; LoRA is what learns. Answers are searched with beams. Printed are ROUGE-L of the
base, of the tuned model and of the first sentence (lead-1), and the paired differences, with 95 % intervals.
"""

from __future__ import annotations

import argparse
import json
import re
from pathlib import Path
from typing import Any

import lorafit
from lorafit.evaluation.statistics import compare
from lorafit.kinds.metrics import RowScore, metrics

SENTENCE_END = re.compile(r"(?<=[.!?])\s+")
SEED = 0


def build_base(model: str, folder: Path) -> None:
    """Saves the encoder-decoder with the encoder's tokenizer."""
    import torch
    from transformers import AutoTokenizer, EncoderDecoderModel

    tokenizer = AutoTokenizer.from_pretrained(model)
    pair: Any = EncoderDecoderModel.from_encoder_decoder_pretrained(model, model)
    with torch.no_grad():
        for layer in pair.decoder.bert.encoder.layer:
            layer.crossattention.load_state_dict(layer.attention.state_dict(), strict=False)
        dense = pair.decoder.cls.predictions.transform.dense
        dense.weight.copy_(torch.eye(len(dense.weight)))
        dense.bias.zero_()
    for settings in (pair.config, pair.generation_config):
        settings.decoder_start_token_id, settings.pad_token_id = tokenizer.cls_token_id, tokenizer.pad_token_id
        settings.eos_token_id = tokenizer.sep_token_id
    pair.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def recipe_of(base: Path, data: Path, options: argparse.Namespace) -> dict[str, Any]:
    """What is trained, and how answers are made."""
    return {
        "name": "summaries",
        "task": {"kind": "seq2seq-lm", "max_target_length": 48},
        "model": {"base": str(base), "quantization": "none", "dtype": "fp32"},
        "adapter": {"r": 64, "alpha": 128, "dropout": 0.0, "target_modules": "all-linear"},
        "data": {
            "train": [{"path": str(data / "train.jsonl"), "limit": options.rows}],
            "test": [{"path": str(data / "test.jsonl"), "limit": options.test_rows}],
            "max_length": 128,
            "overlength": "truncate",
        },
        "training": {
            "epochs": options.epochs,
            "batch_size": 16,
            "learning_rate": options.learning_rate,
            "optimizer": "adamw",
            "schedule": {"kind": "linear", "warmup_ratio": 0.1},
        },
        "evaluation": {"final": ["rouge", "loss"], "num_beams": 4, "no_repeat_ngram_size": 3, "max_new_tokens": 48},
        "output": str(Path(options.runs).absolute() / "run"),
    }


def main() -> None:
    """Builds, trains, scores and prints."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("data", type=Path)
    parser.add_argument("--rows", type=int, default=None)
    parser.add_argument("--test-rows", type=int, default=None)
    parser.add_argument("--epochs", type=float, default=3.0)
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--runs", default="summaries")
    options = parser.parse_args()
    base = Path(options.runs).absolute() / "base"
    if not base.exists():
        build_base(options.model, base)
    run = Path(options.runs).absolute() / "run"
    evaluated = lorafit.evaluate(lorafit.train(recipe_of(base, options.data, options), resume=run.exists()))
    texts = [json.loads(line)["source"] for line in (options.data / "test.jsonl").read_text("utf-8").splitlines()]
    rows = evaluated.evaluation.rows
    leads = [
        RowScore(answer=SENTENCE_END.split(texts[row.line - 1].strip())[0], reference=row.tuned.reference)
        for row in rows
    ]
    rouge, tuned, base_rows = metrics.get("rouge"), [row.tuned for row in rows], [row.base for row in rows]
    print("| ROUGE-L of | value | against | tuned - that, 95 % |")
    for name, other in (("base, no adapter", base_rows), ("lead-1, the first sentence", leads)):
        line = next(line for line in compare("rouge", rouge, other, tuned, seed=SEED) if line.name == "rougeL")
        print(f"| {name} | {line.base:.4f} | tuned {line.tuned:.4f} | {line.difference:+.4f} ({line.span}) |")
    loss = evaluated.metrics["loss"]
    print(f"loss {loss['base']:.3f} -> {loss['tuned']:.3f} on {len(rows)} rows")
    for row in rows[:2]:
        print(f"reference: {row.tuned.reference}\nbase: {row.base.answer}\ntuned: {row.tuned.answer}")


if __name__ == "__main__":
    main()
