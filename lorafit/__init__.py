"""lorafit: fine-tune language models with LoRA and QLoRA from one YAML recipe."""

__version__ = "0.1.0"
