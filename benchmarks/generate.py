"""Time of one answer: `lorafit generate RUN` beside plain transformers and PEFT with the same adapter, each a process.

    python benchmarks/generate.py RUN [--prompt TEXT] [--new-tokens 48] [--repeats 5]

RUN is a run on an NF4 base, such as the quickstart's. The plain script imports, loads the base quantised as the run
was, puts the adapter on it, renders the prompt by the template that ships with it, and writes greedy tokens; it prints
how long each took. Both run in turns, medians are printed, with the ratio, and the answers must be equal.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

PLAIN = """
import json, sys, time
start = time.perf_counter()
import torch
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig
imported = time.perf_counter()
run, prompt, count = sys.argv[1], sys.argv[2], int(sys.argv[3])
card = json.load(open(f"{run}/card.json"))
dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
quantization = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type=card["quantization"]["kind"],
    bnb_4bit_use_double_quant=card["quantization"]["double_quant"],
    bnb_4bit_compute_dtype=dtypes[card["compute_dtype"]],
)
base = AutoModelForCausalLM.from_pretrained(
    card["base_path"], dtype=dtypes[card["dtype"]], quantization_config=quantization, local_files_only=True
)
for module in base.modules():
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False
model = PeftModel.from_pretrained(base, f"{run}/adapter").eval()
tokenizer = AutoTokenizer.from_pretrained(f"{run}/adapter")
loaded = time.perf_counter()
chat = [{"role": "user", "content": prompt}]
ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
with torch.no_grad():
    out = model.generate(**ids, max_new_tokens=count, do_sample=False)
text = tokenizer.decode(out[0, ids["input_ids"].shape[1]:], skip_special_tokens=True)
done = time.perf_counter()
print(json.dumps({"answer": text, "import": imported - start, "load": loaded - imported, "generate": done - loaded}))
"""


def timed(command: list[str]) -> tuple[float, dict[str, object]]:
    """Seconds of a whole process, and the JSON that it printed last."""
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{command[0]} ended with {done.returncode}\n{done.stderr[-2000:]}")
    printed: dict[str, object] = json.loads(done.stdout[done.stdout.index("{") :])
    return seconds, printed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--prompt", default="Why are your teapots so dark?")
    parser.add_argument("--new-tokens", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=5)
    asked = parser.parse_args()
    count = str(asked.new_tokens)
    ours = [sys.executable, "-m", "lorafit", "generate", str(asked.run), "--prompt", asked.prompt]
    ours += ["--max-new-tokens", count, "--json"]
    plain = [sys.executable, "-c", PLAIN, str(asked.run), asked.prompt, count]
    seconds: dict[str, list[float]] = {"lorafit": [], "plain": []}
    parts: list[dict[str, float]] = []
    for _ in range(asked.repeats):
        took, printed = timed(ours)
        seconds["lorafit"].append(took)
        (answer,) = printed["answers"]  # type: ignore[misc]
        took, theirs = timed(plain)
        seconds["plain"].append(took)
        parts.append({name: float(str(theirs[name])) for name in ("import", "load", "generate")})
        same = "same answer" if answer["answer"] == theirs["answer"] else "ANOTHER ANSWER"
        print(f"lorafit {seconds['lorafit'][-1]:.2f} s   plain {took:.2f} s   {same}", flush=True)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    stages = {name: statistics.median(part[name] for part in parts) for name in parts[0]}
    print(f"medians of {asked.repeats}: lorafit {medians['lorafit']:.2f} s, plain {medians['plain']:.2f} s, ", end="")
    print(f"ratio {medians['lorafit'] / medians['plain']:.2f}")
    print("of plain: " + ", ".join(f"{name} {value:.2f} s" for name, value in stages.items()))


if __name__ == "__main__":
    main()
