"""The version of lorafit, and those of the libraries that decide what a run computes."""

__version__ = "0.1.0"

_RECORDED = (
    "lorafit",
    "torch",
    "transformers",
    "peft",
    "bitsandbytes",
    "accelerate",
    "datasets",
    "tokenizers",
    "safetensors",
)


def installed_versions() -> list[str]:
    """`name version` of Python and of every library that decides what a run computes."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = [f"python {platform.python_version()}"]
    for name in _RECORDED:
        try:
            found.append(f"{name} {version(name)}")
        except PackageNotFoundError:
            found.append(f"{name} none")
    return found
