"""Functions that keep a model in memory for others to ask."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from lorafit.console.python_calls import StrPath, call

if TYPE_CHECKING:
    from lorafit.run.trained import Trained
    from lorafit.serving.serve import ServedAll


def serve(
    run: StrPath | Trained,
    *,
    adapters: Mapping[str, StrPath] | Sequence[str] = (),
    ab_split: Mapping[str, float] | str | None = None,
    feedback: StrPath | None = None,
    route: float | None = None,
    drift: bool = False,
    checkpoint: str | int | None = None,
    base_model: StrPath | None = None,
    host: str = "127.0.0.1",
    port: int = 8000,
    allow_loading: bool = False,
    max_new_tokens: int = 256,
    max_running: int = 16,
    max_waiting: int = 64,
    max_batch_tokens: int = 16_384,
    timeout: float = 600.0,
    grace: float = 30.0,
    quiet: bool = False,
) -> ServedAll:
    """Serves a base with its adapters over HTTP until a signal comes; `served.answers` says how many by whom.

    Args:
        run: A model folder, a `.gguf` file or a hub id; or a run or an adapter, which is served on its base.
        adapters: Folders of adapters or runs by name, `{"shop": "runs/shop"}`.
        ab_split: Who answers for the model `split`, by shares of users, `{"a": 0.9, "b": 0.1}`; nobody where None.
        feedback: Take ratings, and add them to this file as rows to train on.
        route: Serve the model `auto`, an adapter chosen by the prompt, else the base: each adapter gets about this
            share of what is like its training prompts, e.g. 0.9; nobody is called so where None.
        drift: Whether /metrics tells how far the prompts of each adapter are from those it was trained on.
        checkpoint: Of a run: `best`, `last` or a step; the saved adapter where None.
        base_model: Of a run or an adapter: folder or hub id of its base, where it is not found by itself.
        host: Where it listens. Other than this machine's own: `LORAFIT_API_KEY` must be set.
        port: 0: any that is free.
        allow_loading: Whether requests may load and unload adapters.
        max_new_tokens: Longest answer of a request that names no length.
        max_running: Requests that are answered at the same time.
        max_waiting: Requests that wait for room; one more gets 429.
        max_batch_tokens: Bound of running requests x longest prompt with its answer.
        timeout: Most seconds of an answer, its wait included.
        grace: Seconds that running answers have when the server is asked to end.
        quiet: No line for each request.
    """
    from lorafit.serving.serve import serve

    return call(serve, {name: value for name, value in locals().items() if name != "serve"})
