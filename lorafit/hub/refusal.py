"""What the hub refuses, and why it was not reached: one clause, and what to do about it, in words of ours.

Nothing of a library's own text is repeated: it can hold a token.
"""

from __future__ import annotations

import contextlib
import re
import socket
import ssl
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

_BROKE_OFF = {"TransportError", "DecodingError"}
_HOLDS_THE_TOKEN = {"LocalProtocolError", "UnicodeEncodeError"}
_NO_ADDRESS = {"InvalidURL", "UnsupportedProtocol", "TooManyRedirects"}
_NO_HUB = {"FileMetadataError", "JSONDecodeError", "KeyError", "TypeError", "AttributeError", "AssertionError"}
_TIMEOUTS = {"TimeoutException", "TimeoutError"}
_UNREACHED = {"TransportError", "ConnectionError", "SSLError"} | _NO_ADDRESS | _HOLDS_THE_TOKEN | _TIMEOUTS
_MORE_WITH_TOKEN = "; with HF_TOKEN set more is allowed"


@dataclass(frozen=True)
class Repo:
    """A model or data set of the hub.

    Attributes:
        id: `name` or `owner/name`.
        kind: What it is.
        revision: Branch, tag or commit; None for the default branch.
    """

    id: str
    kind: Literal["model", "dataset"]
    revision: str | None = None

    @property
    def noun(self) -> str:
        """For messages."""
        return "model" if self.kind == "model" else "data set"

    @property
    def url(self) -> str:
        """Its page, for people."""
        return f"{_endpoint()}/{'datasets/' if self.kind == 'dataset' else ''}{self.id}"

    @property
    def local_way(self) -> str:
        """What helps without the hub."""
        is_model = self.kind == "model"
        return "copy the model here and give model.base its folder" if is_model else "name a local file with its suffix"

    def key(self, name: str = "") -> str:
        """What the user would change: the name, or `revision`."""
        return f"model.{name or 'base'}" if self.kind == "model" else name or "the name"


class HubRefusedError(Exception):
    """What was asked for is not whole on this disk, and the hub did not give it.

    Args:
        what: Why, a clause of its own: `the hub has no revision 'v9' of it`.
        todo: What the user can do about it.
        is_wanted: Whether the user turned the hub off.
    """

    def __init__(self, what: str, todo: str, *, is_wanted: bool = False) -> None:
        super().__init__(what)
        self.what, self.todo, self.is_wanted = what, todo, is_wanted


def explain(repo: Repo, error: BaseException, denied: HubRefusedError | None = None) -> HubRefusedError:
    """What an error of the hub's library says of a repository.

    Args:
        repo: What was asked for.
        error: The library's error.
        denied: The last answer that forbade something, which `datasets` tells in other errors' words.
    """
    chain = list(chain_of(error))
    for link in chain:
        names = _names([link])
        if names & _HOLDS_THE_TOKEN:
            return _bad_token()
        if "RevisionNotFoundError" in names:
            return _no_revision(repo)
        if (response := getattr(link, "response", None)) is not None:
            return refused_by_status(repo, response.status_code, response.headers)
        if names & _BROKE_OFF or "Consistency check" in str(link):
            todo = "start again: whole files are kept, nothing half is used"
            return HubRefusedError("its download broke off", todo)
    if denied is not None:
        return denied
    if "HFValidationError" in _names(chain):
        return HubRefusedError("no hub has such an id", f"check {repo.key()}")
    if _names(chain) & _NO_HUB:
        return HubRefusedError(f"{_endpoint()} does not answer as a hub", "check HF_ENDPOINT and the proxy")
    what = f"the hub's library fails ({type(error).__name__})"
    return HubRefusedError(what, "start again, with --debug to see all of it")


def refused_by_status(repo: Repo, code: int, headers: Mapping[str, str]) -> HubRefusedError:
    """What the hub's answer to a request says, by its HTTP status and the hub's own headers."""
    from huggingface_hub import get_token

    has_token = bool(get_token())
    kind = headers.get("x-error-code")
    if kind == "GatedRepo":
        whose = "the account of your HF_TOKEN" if has_token else "your account, and set HF_TOKEN"
        return HubRefusedError("on the hub it is gated", f"accept its licence at {repo.url} with {whose}")
    if kind == "EntryNotFound":
        what, todo = "on the hub it lacks a file that is needed", f"look at {repo.url}, and use another {repo.noun}"
    elif code == 401 and has_token:
        what, todo = "the hub refuses your HF_TOKEN (401)", "renew the token, or unset it"
    elif code in (401, 404):
        seen = "your HF_TOKEN may not see it" if has_token else "it is private and needs HF_TOKEN"
        what, todo = f"the hub has no {repo.noun} of this name, or {seen}", f"check {repo.key()}"
    elif code == 403:
        what, todo = "the hub forbids it to you (403)", "ask its owner for access, or use another HF_TOKEN"
    elif code == 429:
        told = re.search(r"\d+$", headers.get("retry-after") or headers.get("ratelimit") or "")
        todo = f"wait {told.group()} seconds and start again" if told else "wait some minutes and start again"
        what, todo = "the hub asks to wait: too many requests (429)", todo + _MORE_WITH_TOKEN * (not has_token)
    else:
        what, todo = f"the hub fails at the moment (error {code})", "start again later"
    return HubRefusedError(what, todo)


def push_not_reached(repo: Repo, error: BaseException) -> HubRefusedError | None:
    """Why a push did not get to the hub; None where the hub answered it, or something else failed."""
    from huggingface_hub import constants, is_offline_mode

    if getattr(error, "response", None) is not None or not _names(chain_of(error, hidden=True)) & _UNREACHED:
        return None
    if is_offline_mode():
        return HubRefusedError("HF_HUB_OFFLINE keeps the hub from being asked", "unset it to push", is_wanted=True)
    host = urlsplit(_endpoint()).hostname or _endpoint()
    return not_reached(repo, error, host, constants.DEFAULT_REQUEST_TIMEOUT, otherwise="connect, and start again")


def not_reached(
    repo: Repo, error: BaseException, host: str, seconds: float, *, otherwise: str | None = None
) -> HubRefusedError:
    """Why a request got no answer at all.

    Args:
        repo: What was asked for.
        error: What the request raised.
        host: Of the request.
        seconds: How long an answer was waited for.
        otherwise: What helps where nothing but a connection does; None: of a download.
    """
    chain = list(chain_of(error, hidden=True))
    names = _names(chain)
    if names & _HOLDS_THE_TOKEN:
        return _bad_token()
    todo = otherwise or f"connect once, or {repo.local_way}"
    if names & _NO_ADDRESS:
        what, todo = f"{_endpoint()} is not the address of a hub", "check HF_ENDPOINT"
    elif any(isinstance(link, ssl.SSLError) for link in chain):
        what, todo = f"the certificate of {host} is not trusted", "check the proxy, or set SSL_CERT_FILE"
    elif "ProxyError" in names:
        what, todo = "the proxy refuses the hub", "check HTTPS_PROXY and NO_PROXY"
    elif any(isinstance(link, socket.gaierror) for link in chain):
        what = f"the hub cannot be reached (no address for {host})"
    elif names & _TIMEOUTS:
        what = f"the hub cannot be reached ({host} gave no answer for {seconds:g} seconds)"
        todo = otherwise or "start again later, or set HF_HUB_ETAG_TIMEOUT to more seconds"
    else:
        said = next((link.strerror for link in reversed(chain) if isinstance(link, OSError) and link.strerror), None)
        what = f"the hub cannot be reached ({host}: {(said or 'no answer').lower()})"
    return HubRefusedError(what, todo)


def turned_off(repo: Repo) -> HubRefusedError:
    """The user wants no hub."""
    todo = f"unset it once to download it, or {repo.local_way}"
    return HubRefusedError("HF_HUB_OFFLINE keeps the hub from being asked", todo, is_wanted=True)


def _no_revision(repo: Repo) -> HubRefusedError:
    from huggingface_hub import HfApi

    name, todo = repo.revision or "main", f"check {repo.key('revision')}"
    with contextlib.suppress(Exception):
        here = HfApi().resolve_revision(repo.id, repo_type=repo.kind, revision=name, local_files_only=True)
        todo += f"; what it was lies here as {here.resolved}"
    return HubRefusedError(f"the hub has no revision '{name}' of it", todo)


def _names(errors: Iterable[BaseException]) -> set[str]:
    """Names of the errors' classes, and of what they inherit: where those live differs by version."""
    return {cls.__name__ for error in errors for cls in type(error).__mro__}


def chain_of(error: BaseException | None, *, hidden: bool = False) -> Iterator[BaseException]:
    """An error and what it was raised from, outermost first: as a traceback shows it, or with what that hides."""
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        seen.add(id(error))
        yield error
        error = error.__cause__ or (error.__context__ if hidden or not error.__suppress_context__ else None)


def _endpoint() -> str:
    """The hub's address, without a password that may stand in it."""
    from huggingface_hub import constants

    return re.sub(r"//[^/@]*@", "//", constants.ENDPOINT)


def _bad_token() -> HubRefusedError:
    return HubRefusedError("HF_TOKEN holds what no token holds", "set it again, without quotes or blanks")
