"""`lorafit export`: a trained adapter in the form that another program reads, changed where it would read it wrongly.

source ──> targets.py ──> one file a target       peft, gguf, gguf_lora, ollama, vllm, hub
             factors           A and B of each layer, with their scale in B
             architectures     what a GGUF calls tensors and numbers of a model
             gguf_file         weights, streamed into a GGUF file and read back
             vocabulary        the tokenizer in it
             go_template       a chat template as Ollama's
             readme            its base, and lines that ask it
             model_card        what the hub shows
             llama_cpp         logits of llama.cpp beside lorafit's
"""
