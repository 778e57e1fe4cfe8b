"""Data sets of the Hugging Face hub, through `datasets`. Code that a data set ships is never run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from lorafit.contracts import Reporter
from lorafit.data.sources.lines import RawRows
from lorafit.data.sources.parquet import without_nulls
from lorafit.errors import DataError, LorafitError, SafetyError
from lorafit.hub.asking import Asked, ask
from lorafit.hub.refusal import HubRefusedError, Repo, chain_of

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


def is_hub_id(path: str) -> bool:
    """Whether a path that is no local file can be the id of a data set, `name` or `owner/name`."""
    return _HUB_ID.fullmatch(path) is not None


def as_stored(found: Any) -> Any:
    """A `datasets.Dataset` whose images are read as they are stored, their bytes or path, and not decoded."""
    import datasets

    stored = datasets.Image(decode=False)
    for name, feature in found.features.items():
        if isinstance(feature, datasets.Image):
            found = found.cast_column(name, stored)
        elif isinstance(getattr(feature, "feature", None), datasets.Image):
            found = found.cast_column(name, datasets.List(stored))
    return found


class HubRows:
    """One split of a hub data set, downloaded on first use into the cache of `datasets`.

    Args:
        name: Its id.
        subset: Its configuration; None for the only one.
        split: Its split.
        revision: Branch, tag or commit; None for the newest.
        reporter: Told that the hub is asked, and where it gave no answer.
    """

    def __init__(self, name: str, *, subset: str | None, split: str, revision: str | None, reporter: Reporter) -> None:
        self.name, self.subset, self.split, self.revision = name, subset, split, revision
        self._reporter = reporter
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
            try:
                self._dataset = ask(Repo(self.name, "dataset", self.revision), self._reporter, self._load)
            except HubRefusedError as refused:
                what = f"no such file, and {refused.what}"
                raise DataError(what, file=self.name, todo=refused.todo) from refused
        return self._dataset

    def _load(self, asked: Asked) -> Any:
        import datasets

        datasets.disable_progress_bars()
        datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False  # it would tell another server which data sets are read
        commit = asked.find_commit()
        if commit is None and self.revision is not None:
            asked.require_answer()
        try:
            found = self._prepared(commit) if commit is not None else None
            if found is None:
                found = datasets.load_dataset(
                    self.name, name=self.subset, split=self.split, revision=commit, streaming=False
                )
        except Exception as error:  # every library below it raises its own kinds
            if (explained := self._explain(error)) is not None:
                raise explained from None
            raise
        places = (Path(file["filename"]).parent.name for file in found.cache_files)  # the last part is the commit
        given = next(places, None) or commit
        if commit is not None and given != commit:  # `datasets` takes the newest copy it has, where others fail
            asked.require_answer()
            raise DataError(f"cannot be loaded as of commit {commit[:12]}", file=self.name, key="revision")
        asked.say_refused(given or "unknown")
        return as_stored(found)

    def _prepared(self, commit: str) -> Any:
        """The rows as an earlier command prepared them, without a request; None where none did."""
        import datasets
        from datasets.naming import camelcase_to_snakecase
        from datasets.packaged_modules.cache.cache import Cache

        subset = self.subset or "default"  # only this name says that it is the one meant where none is given
        *owner, name = self.name.split("/")
        folder = Path(datasets.config.HF_DATASETS_CACHE, "___".join([*owner, camelcase_to_snakecase(name)]), subset)
        version = next((place.parent.name for place in folder.glob(f"*/{commit}")), None)
        if version is None:
            return None
        made = Cache(repo_id=self.name, dataset_name=name, config_name=subset, version=version, hash=commit)
        return made.as_dataset(split=self.split)

    def _explain(self, error: Exception) -> LorafitError | None:
        """What is wrong with the data set or the recipe's words for it; None for what the hub refuses."""
        text = " ".join(str(error).split())
        lower = text.lower()
        if "script" in lower or "trust_remote_code" in lower:
            script = re.search(r"[\w.-]+\.py|$", text)[0] or "its own code"  # type: ignore[index]
            what = f"needs a loading script of its own, which is not executed: {script}"
            return SafetyError(what, file=self.name, todo="use a data set of data files, or convert it once")
        if "split" in lower and ("unknown" in lower or "bad" in lower):
            return DataError(text, file=self.name, key="split")
        if "config" in lower and any(part in lower for part in ("missing", "not found", "for config")):
            return DataError(text, file=self.name, key="subset")
        if type(error).__module__.startswith("datasets.") and "NotFound" not in type(error).__name__:
            first = " ".join(str(list(chain_of(error))[-1]).split())  # the last says only that one happened
            return DataError(f"cannot be read: {first}", file=self.name, todo="look at its files on the hub")
        return None

    def rows(self) -> RawRows:
        """The rows with their numbers, from 1."""
        for number, row in enumerate(self.load(), start=1):
            yield number, {key: without_nulls(value) for key, value in row.items()}

    def fingerprint(self) -> str:
        """What `datasets` knows the downloaded rows by; the revision resolved."""
        return f"{self.name}/{self.subset}/{self.split}/{self.load()._fingerprint}"

    def count(self) -> int:
        """Rows of the split."""
        return int(self.load().num_rows)
