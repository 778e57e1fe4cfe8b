"""Data sets of the Hugging Face hub, through `datasets`. Code that a data set ships is never run."""

from __future__ import annotations

import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit
from urllib.request import getproxies

from lorafit.data.lines import RawRows
from lorafit.data.parquet import without_nulls
from lorafit.errors import DataError, LorafitError, SafetyError

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Whether a path that is no local file can be the id of a data set, `name` or `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


class HubRows:
    """One split of a hub data set, downloaded on first use into the cache of `datasets`.

    Args:
        name: Its id.
        subset: Its configuration; None for the only one.
        split: Its split.
        revision: Branch, tag or commit; None for the newest.
    """

    def __init__(self, name: str, *, subset: str | None, split: str, revision: str | None) -> None:
        self.name, self.subset, self.split, self.revision = name, subset, split, revision
        self._dataset: Any = None

    def load(self) -> Any:
        """The `datasets.Dataset`.

        Raises:
            DataError: The hub cannot be reached, or has no such data set, subset, split or revision.
            SafetyError: The data set needs code of its own.
        """
        if self._dataset is None:
            if Path(self.name).exists():  # `datasets` would take it for the data set
                todo = "write its path with a leading ./ relative to the recipe, or start elsewhere"
                raise DataError("a local file or folder of this name is in the way", file=self.name, todo=todo)
            _go_offline_where_no_name_resolves()
            import datasets

            datasets.disable_progress_bars()
            try:
                self._dataset = datasets.load_dataset(
                    self.name, name=self.subset, split=self.split, revision=self.revision, streaming=False
                )
            except Exception as error:  # every library below it raises its own kinds
                raise self._explain(error) from None
        return self._dataset

    def _explain(self, error: Exception) -> LorafitError:
        text = " ".join(str(error).split())
        kinds = {cls.__name__ for cls in type(error).__mro__}
        lower = text.lower()
        if "script" in lower or "trust_remote_code" in lower:
            return SafetyError(
                f"needs a loading script of its own, which is not executed: {_script_name(text)}",
                file=self.name,
                todo="use a data set of data files, or convert it once",
            )
        if "split" in lower and ("unknown" in lower or "bad" in lower):
            return DataError(text, file=self.name, key="split")
        if "config" in lower and any(part in lower for part in ("missing", "not found", "for config")):
            return DataError(text, file=self.name, key="subset")
        if "DatasetNotFoundError" in kinds or "RepositoryNotFoundError" in kinds:
            todo = "check the id; a private or gated one needs HF_TOKEN in the environment"
            return DataError("no such file, and no data set of this name on the hub", file=self.name, todo=todo)
        if kinds & {
            "ConnectionError",
            "OfflineModeIsEnabled",
            "ConnectError",
            "TimeoutException",
            "LocalEntryNotFoundError",
        }:
            todo = "name a local file with its suffix, or go online once so that it is cached"
            return DataError("no such file, and the hub cannot be reached (offline)", file=self.name, todo=todo)
        return DataError(f"cannot be loaded from the hub: {type(error).__name__}: {text}", file=self.name)

    def rows(self) -> RawRows:
        """The rows with their numbers, from 1."""
        return self._number(self.load())

    @staticmethod
    def _number(dataset: Any) -> Iterator[tuple[int, dict[str, Any]]]:
        for number, row in enumerate(dataset, start=1):
            yield number, {key: without_nulls(value) for key, value in row.items()}

    def fingerprint(self) -> str:
        """What `datasets` knows the downloaded rows by; the revision resolved."""
        return f"{self.name}/{self.subset}/{self.split}/{self.load()._fingerprint}"

    def count(self) -> int:
        """Rows of the split."""
        return int(self.load().num_rows)


def _go_offline_where_no_name_resolves() -> None:
    """Without a network the hub's client would try for half a minute; told so, it looks into its cache at once."""
    if "HF_HUB_OFFLINE" in os.environ or getproxies():
        return
    host = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co")).hostname
    try:
        socket.getaddrinfo(host, 443)
    except OSError:
        os.environ["HF_HUB_OFFLINE"] = "1"


def _script_name(text: str) -> str:
    found = re.search(r"[\w.-]+\.py", text)
    return found.group() if found else "its own code"
