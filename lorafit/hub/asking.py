"""The Hugging Face hub: asked once, for seconds; what it refuses is one sentence of ours.

    ask(repo, reporter, work)           every request that the hub's library makes in `work` passes one guard
        asked.find_commit()             branch or tag -> commit; a pinned one costs no request
        ...                             the first request without an answer ends all asking, and the library turns to
                                        its cache, as it does with HF_HUB_OFFLINE=1
    HubRefusedError                     what the hub said instead, where the cache does not have it either

Left alone, the library tries for half a minute, waits for ever where a server is silent, and prints each try.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
import os
import re
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, wait
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from lorafit.contracts import Reporter
from lorafit.errors import LorafitError
from lorafit.hub.refusal import HubRefusedError, Repo, explain, not_reached, refused_by_status, turned_off

T = TypeVar("T")
_COMMIT = re.compile(r"[0-9a-f]{40}")
_ANSWER_SECONDS = 10.0
_STOP_SECONDS = 10.0
_SIGNAL_SECONDS = 0.2  # a signal that reaches another thread does not wake the one that waits
_ABANDONED_SECONDS = 3600.0
_BUSY = (408, 429)

_heard: dict[Repo, tuple[str | None, HubRefusedError | None]] = {}
"""What the hub said of each name when it was asked: a process asks once, and sees one state of a branch."""


class Asked:
    """What becomes of asking for one repository.

    Attributes:
        repo: What is asked for.
        commit: What its branch or tag means; None where nobody knows.
        refusal: Why the hub gave no answer; None as long as it does.
    """

    def __init__(self, repo: Repo, reporter: Reporter, send: Callable[..., Any]) -> None:
        self.repo = repo
        self.commit, self.refusal = _heard.get(repo, (None, None))
        self._reporter, self._send = reporter, send
        self._is_said = self._is_stopped = False
        self._denied: HubRefusedError | None = None  # of a single file, which `datasets` tells in other errors' words

    def find_commit(self) -> str | None:
        """The commit that the revision means: what the hub says, or, where it says nothing, what it said last; None,
        with a `refusal`, where it never did.

        Raises:
            Exception: The library's, which `ask` explains.
        """
        repo = self.repo
        if repo.revision is not None and _COMMIT.fullmatch(repo.revision):
            return repo.revision
        if self.commit is None and self.refusal is None:
            from huggingface_hub import HfApi
            from huggingface_hub.errors import HfHubHTTPError, RevisionNotFoundError, RevisionResolutionError

            resolve = partial(HfApi().resolve_revision, repo.id, repo_type=repo.kind, revision=repo.revision)
            try:
                with contextlib.suppress(RevisionResolutionError):
                    self.commit = resolve().resolved
            except RevisionNotFoundError:
                raise
            except HfHubHTTPError as error:  # withdrawn, gated by now, another token: what lies here is still good
                self.refusal = self.explain(error)
                with contextlib.suppress(RevisionResolutionError):
                    self.commit = resolve(local_files_only=True).resolved
        return self.commit

    def say_refused(self, commit: str) -> None:
        """Warns that the copy in the cache is used because the hub gave no answer."""
        if self.refusal is not None and not self.refusal.is_wanted:
            self._reporter.warn(f"{self.refusal.what}; {self.repo.id} is used as it lies here (commit {commit[:12]})")

    def require_answer(self) -> None:
        """Raises the refusal where the hub gave no answer."""
        if self.refusal is not None:
            raise self.refusal

    def send(self, request: Any, **options: Any) -> Any:
        """Stands in for `send` of the library's client. What raises here is not tried again: the library takes it for
        its offline mode. Only a download that broke off and is being resumed is left to the library's own few tries.
        """
        from huggingface_hub import is_offline_mode
        from huggingface_hub.errors import OfflineModeIsEnabled

        if "range" in request.headers and not self._is_stopped:
            return self._unless_stopped(self._send(request, **options))
        if is_offline_mode():
            self.refusal = turned_off(self.repo)
        if self.refusal is None:
            self._say(request)
            seconds = float(os.environ.get("HF_HUB_ETAG_TIMEOUT") or _ANSWER_SECONDS)
            limits = request.extensions.get("timeout", {})
            request.extensions["timeout"] = {key: seconds if own is None else own for key, own in limits.items()}
            try:
                response = _result_of(_start(partial(self._send, request, **options)), seconds)
            except Exception as error:
                self.refusal = not_reached(self.repo, error, str(request.url.host), seconds)
            else:
                code, headers = response.status_code, response.headers
                if code in (401, 403):
                    self._denied = refused_by_status(self.repo, code, headers)
                if code < 500 and code not in _BUSY:
                    return self._unless_stopped(response)
                self.refusal = refused_by_status(self.repo, code, headers)
                response.close()
        raise OfflineModeIsEnabled(self.refusal.what)

    def explain(self, error: BaseException) -> HubRefusedError:
        """A library's error in our words."""
        return self.refusal or explain(self.repo, error, self._denied)

    def stop(self) -> None:
        """Lets nothing begin any more."""
        self._is_stopped, self.refusal = True, HubRefusedError("it was stopped", "start again")

    def _unless_stopped(self, response: Any) -> Any:
        """An answer, unless it came from a connection that was opened while the others were closed."""
        if self._is_stopped:
            response.close()
            self.require_answer()
        return response

    def _say(self, request: Any) -> None:
        if not self._is_said:
            self._is_said = True
            self._reporter.info(f"asking {request.url.host} for {self.repo.id}")


def ask(repo: Repo, reporter: Reporter, work: Callable[[Asked], T]) -> T:
    """What `work` gives, in which the hub's library, and `datasets` over it, may ask the hub.

    Args:
        repo: What is asked for.
        reporter: Told that the hub is asked, and where it gave no answer.
        work: Runs in a thread: the library waits for its own threads, so that a Ctrl-C would not end a long download.

    Raises:
        HubRefusedError: Whatever the libraries raise, but for errors of ours and of this disk.
    """
    from huggingface_hub import close_session, constants, get_session

    constants.HF_HUB_DISABLE_TELEMETRY = True  # it costs a request, and tells with each who is asking
    session = get_session()
    asked = Asked(repo, reporter, session.send)
    vars(session)["send"] = asked.send  # over the class's own, on this one client: a program's settings stay
    working = _start(partial(work, asked))
    try:
        result = _result_of(working)
    except (LorafitError, HubRefusedError):
        raise
    except Exception as error:  # the hub's errors share no base class over versions: network, HTTP, cache, validation
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, ConnectionError):
            raise  # this disk is full, or its cache may not be written
        if asked.refusal is None and _is_ours(error):
            raise
        raise asked.explain(error) from error
    finally:
        if not working.done():  # a signal
            asked.stop()
            session.close()
            _stop_xet()
            wait([working], _STOP_SECONDS)
            close_session()
        vars(session).pop("send", None)
    _heard[repo] = asked.commit, asked.refusal
    return result


def fetch_files(repo: Repo, patterns: Sequence[str], needed: Sequence[str], reporter: Reporter) -> Path:
    """The folder of the cache with the files of `repo` that match, downloaded if need be.

    Args:
        repo: What is wanted.
        patterns: Of the files.
        needed: Patterns without which a folder that the hub did not answer for is not whole.
        reporter: Told that the hub is asked, and where it gave no answer.

    Raises:
        HubRefusedError: They are not whole on this disk, and the hub did not give them.
    """

    def fetch(asked: Asked) -> Path:
        from huggingface_hub import snapshot_download

        commit = asked.find_commit()
        if commit is None:
            asked.require_answer()
        _remove_abandoned(repo)
        folder = Path(snapshot_download(repo.id, repo_type=repo.kind, revision=commit, allow_patterns=list(patterns)))
        if not all(any(folder.glob(pattern)) for pattern in needed):
            asked.require_answer()  # others that fill this cache fetch single files
        asked.say_refused(folder.name)
        return folder

    return ask(repo, reporter, fetch)


def _is_ours(error: BaseException) -> bool:
    """Whether an error comes from a line of lorafit itself: a bug, which is not the hub's."""
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and str(trace.tb_frame.f_globals.get("__name__")).startswith("lorafit.")


def _remove_abandoned(repo: Repo) -> None:
    """Removes what killed downloads left; one that goes on has written to its file a moment ago."""
    from huggingface_hub import constants

    blobs = Path(constants.HF_HUB_CACHE, f"{repo.kind}s--{repo.id.replace('/', '--')}", "blobs")
    for file in blobs.glob("*.incomplete"):
        with contextlib.suppress(OSError):
            if time.time() - file.stat().st_mtime > _ABANDONED_SECONDS:
                file.unlink()


def _stop_xet() -> None:
    """Ends the downloads of the hub's second library, which has its own connections."""
    with contextlib.suppress(Exception):
        from huggingface_hub.utils._xet import abort_xet_session

        abort_xet_session()  # type: ignore[no-untyped-call]


def _start(call: Callable[[], T]) -> Future[T]:
    """What comes of a call that is made in a thread, which nobody has to wait for."""
    future: Future[T] = Future()

    def work() -> None:
        try:
            future.set_result(call())
        except BaseException as error:
            future.set_exception(error)

    threading.Thread(target=contextvars.copy_context().run, args=(work,), daemon=True).start()
    return future


def _result_of(future: Future[T], seconds: float = math.inf) -> T:
    """What comes of it, waited for.

    Raises:
        TimeoutError: Nothing came in time: no timeout of a socket covers names that do not resolve, or a server that
            sends a byte now and then.
    """
    deadline = time.monotonic() + seconds
    while not wait([future], min(_SIGNAL_SECONDS, max(0.0, deadline - time.monotonic()))).done:
        if time.monotonic() >= deadline:
            raise TimeoutError
    return future.result()
