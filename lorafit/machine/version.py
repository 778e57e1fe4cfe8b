"""The version of lorafit, and those of the libraries that decide what a run computes."""

from functools import cache

__version__ = "0.1.0"

_RECORDED = (
    *("lorafit", "torch", "transformers", "peft", "bitsandbytes", "accelerate"),
    *("datasets", "tokenizers", "safetensors", "numpy"),
)


def installed_versions() -> dict[str, str]:
    """Of Python and of every library that decides what a run computes, by name; `none` where one is not installed.

    The one list of them: a plan is measured anew where any changed, a run folder and a checkpoint record it, and a
    resume says what differs.
    """
    return dict(_find_versions())


@cache
def _find_versions() -> dict[str, str]:
    import platform
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in _RECORDED:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "none"
    return found
