"""`--to hub`: the adapter as PEFT opens it, with a model card made of the run, pushed in one commit."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from lorafit.console.wording import first_line
from lorafit.errors import ModelError, UsageError
from lorafit.exporting.exported import REPOSITORY, Exported
from lorafit.exporting.model_card import write_card
from lorafit.exporting.peft import prove_peft, require_provable, write_clean
from lorafit.exporting.readme import note_quantised
from lorafit.exporting.source import Source
from lorafit.files.atomic import atomic_dir
from lorafit.hub.refusal import Repo, push_not_reached

_TOKEN = "HF_TOKEN"


def export(source: Source, output: Path) -> Exported:
    """Writes the folder, and pushes it where that is wished; of a push that fails nothing is kept.

    Raises:
        UsageError: No repository is named, or no token is in the environment.
        ModelError: The hub refuses it.
    """
    wish = source.wish
    if wish.repo is None or not REPOSITORY.fullmatch(wish.repo):
        raise UsageError("--to hub needs a repository", key="--repo", todo="name it OWNER/NAME")
    token = os.environ.get(_TOKEN)
    if not wish.dry_run and not token:
        todo = f"set {_TOKEN} to a token that may write, or add --dry-run to see what would be pushed"
        raise UsageError(f"no token is in the environment ({_TOKEN})", key="--to", todo=todo)
    require_provable(source)
    with tempfile.TemporaryDirectory(prefix="lorafit-hub-") as place:
        kept = wish.dry_run or wish.output is not None
        made = output if kept else Path(place) / "adapter"
        with atomic_dir(made, replace=made.exists(), lists_files=False) as folder:
            notes = [*write_clean(source, folder), *note_quantised(source)]
            notes += write_card(source, folder, wish.repo)
            proof = prove_peft(source, folder) if wish.verify else None
            url = None if wish.dry_run else _push(folder, wish.repo, str(token), private=wish.private)
    if wish.dry_run:
        notes.append(f"nothing was sent: without --dry-run this folder would be {wish.repo}")
    return Exported("hub", output if kept else None, notes, None, proof, url)


def _push(folder: Path, repo: str, token: str, *, private: bool) -> str:
    """One commit with every file of the folder; gives back its address."""
    from huggingface_hub import HfApi

    api = HfApi(token=token)
    try:
        api.create_repo(repo, private=private, exist_ok=True)
        pushed = api.upload_folder(repo_id=repo, folder_path=folder, commit_message="Adapter trained with lorafit")
    except (
        Exception
    ) as error:  # the library's share no base class: network, answers, files, uploads of its second library
        if (unreached := push_not_reached(Repo(repo, "model"), error)) is not None:
            raise ModelError(f"nothing was pushed: {unreached.what}", key="--to", todo=unreached.todo) from error
        response = getattr(error, "response", None)
        status = "" if response is None else f"status {response.status_code}, "
        todo = f"check --repo, and that {_TOKEN} may write there"
        raise ModelError(f"the hub took nothing: {status}{first_line(error)}", key="--repo", todo=todo) from error
    return str(pushed.commit_url)
