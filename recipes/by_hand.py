"""QLoRA by hand: what `lorafit train` and `lorafit merge` do, in one flat file without lorafit.

    python recipes/by_hand.py BASE ROWS.jsonl OUT [STEPS]

BASE is a model folder (safetensors, tokenizer, chat template), ROWS has an object a line with question and answer, OUT
gets the adapter. Read it from top to bottom: load in NF4, mask a chat, cut a step, train, save, merge one weight. What
is left out is what lorafit is for: every error told before it costs time, resume, evaluation, speed.
"""

import json
import math
import sys
from pathlib import Path

import bitsandbytes.functional as bnb
import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

base, rows_file, out = sys.argv[1:4]
steps = int(sys.argv[4]) if len(sys.argv) > 4 else 20
r, alpha, seed = 8, 16, 0
learning_rate, max_grad_norm = 1e-2, 1.0
batch_rows, micro_batch_tokens = 12, 128  # rows of an optimizer step; padded tokens of one forward

# 1. Load in NF4. Each linear's weights are cut into blocks of 64. A block keeps one scale, its largest absolute value,
#    and each weight becomes one of 16 codes, which lie where a normal distribution has its quantiles (Dettmers et al.
#    2023, QLoRA, equation 4). `double_quant` quantises the scales too: 4.13 instead of 4.5 bits a weight. The output
#    head stays as it is.
tokenizer = AutoTokenizer.from_pretrained(base)
model = AutoModelForCausalLM.from_pretrained(
    base,
    dtype=torch.float32,
    attn_implementation="eager",
    quantization_config=BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=torch.float32,
    ),
)
for module in model.modules():  # on CPUs with AVX512-BF16 an evaluation would repack the weights, and break later steps
    if hasattr(module, "support_avx512bf16_for_cpu"):
        module.support_avx512bf16_for_cpu = False

# 2. Put LoRA beside every linear: W x becomes W x + (alpha / r) B A x (Hu et al. 2021, LoRA, section 4.1). W is frozen.
#    A begins random and B at zero, so that the model begins as it was. Only A and B are trained, in fp32.
model.requires_grad_(False)
torch.manual_seed(seed)
model = get_peft_model(model, LoraConfig(r=r, lora_alpha=alpha, target_modules="all-linear", task_type="CAUSAL_LM"))
trained_parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]

# 3. Mask each chat: of the rendered text only what the model itself will write carries loss, and that is the answer and
#    the token that ends it. The offsets say which characters each token stands for.
examples = []  # pairs of token ids and flags; a flag says whether the token is to be predicted
for line in Path(rows_file).read_text(encoding="utf-8").splitlines():
    row = json.loads(line)
    asked = [{"role": "user", "content": row["question"]}]
    prompt = tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True)
    answered = [*asked, {"role": "assistant", "content": row["answer"]}]
    whole = tokenizer.apply_chat_template(answered, tokenize=False)
    end = whole.index(tokenizer.eos_token, len(prompt)) + len(tokenizer.eos_token)
    tokens = tokenizer(whole, add_special_tokens=False, return_offsets_mapping=True)
    flags = [start >= len(prompt) and stop <= end for start, stop in tokens["offset_mapping"]]
    examples.append((tokens["input_ids"], flags))

# 4. Train. The gradient of a step is that of the mean loss over all its labels, however its rows are cut: each
#    micro-batch adds the gradient of its sum, divided by the labels of the whole step. Dividing each micro-batch by its
#    own labels instead would weigh short rows more, the more the finer the cut.
optimizer = torch.optim.AdamW(trained_parameters, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.0)
model.train()
for step in range(1, steps + 1):
    first = (step - 1) * batch_rows
    rows = sorted((examples[(first + i) % len(examples)] for i in range(batch_rows)), key=lambda row: -len(row[0]))

    # Cut the step: rows of like length together, so that little is padding, as many as the budget of a forward holds.
    micro_batches = [[rows[0]]]
    for row in rows[1:]:
        longest = len(micro_batches[-1][0][0])
        if (len(micro_batches[-1]) + 1) * longest <= micro_batch_tokens:
            micro_batches[-1].append(row)
        else:
            micro_batches.append([row])

    # Position t predicts token t + 1: the first token of a row is never a label.
    labels_of_step = sum(sum(flags[1:]) for _, flags in rows)
    loss_of_step = 0.0
    for micro_batch in micro_batches:
        longest = len(micro_batch[0][0])
        ids = torch.tensor([ids + [0] * (longest - len(ids)) for ids, _ in micro_batch])
        is_label = torch.tensor([flags + [False] * (longest - len(flags)) for _, flags in micro_batch])
        # Padding stands on the right, and a causal model looks to the left: no mask is needed.
        logits = model(input_ids=ids, use_cache=False).logits
        predicted, wanted = logits[:, :-1][is_label[:, 1:]], ids[:, 1:][is_label[:, 1:]]
        loss_sum = torch.nn.functional.cross_entropy(predicted.float(), wanted, reduction="sum")
        (loss_sum / labels_of_step).backward()
        loss_of_step += loss_sum.item() / labels_of_step

    # Half a cosine from the peak down; clip the gradient to a norm of 1; update.
    for group in optimizer.param_groups:
        group["lr"] = learning_rate * 0.5 * (1 + math.cos(math.pi * (step - 1) / steps))
    torch.nn.utils.clip_grad_norm_(trained_parameters, max_grad_norm)
    optimizer.step()
    optimizer.zero_grad()
    print(json.dumps({"step": step, "loss": loss_of_step, "labels": labels_of_step, "forwards": len(micro_batches)}))

# 5. Save the adapter alone: a few MB, which PEFT puts back on the same base.
model.save_pretrained(out)

# 6. Merge one weight. What was trained on is the dequantised weight and not the original one, and so that is what gets
#    the update: W' = dequantise(codes, scales) + (alpha / r) B A. Then W' x is what the adapter computed.
saved = load_file(str(Path(out) / "adapter_model.safetensors"))
name, layer = next((name, module) for name, module in model.named_modules() if hasattr(module, "lora_A"))
weight = bnb.dequantize_4bit(layer.base_layer.weight.data, layer.base_layer.weight.quant_state).float()
merged = weight + alpha / r * saved[f"{name}.lora_B.weight"] @ saved[f"{name}.lora_A.weight"]
x = torch.randn(4, layer.in_features)
model.eval()
with torch.no_grad():
    difference = (x @ merged.T + (0 if layer.base_layer.bias is None else layer.base_layer.bias) - layer(x)).abs().max()
print(json.dumps({"merged": name, "largest_difference": difference.item()}))
