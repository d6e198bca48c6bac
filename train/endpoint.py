"""A chat model behind an OpenAI-compatible address, with its answers cached in a file."""

from __future__ import annotations

import hashlib
import http.client
import json
import logging
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train.errors import UserError

logger = logging.getLogger(__name__)

Message = dict[str, str]

RETRIED = (408, 409, 425, 429, 500, 502, 503, 504)
"""HTTP errors that may be temporary."""
REFUSED = (401, 403, 404)
"""HTTP errors that every question would get; any other concerns this question alone."""
LONGEST_WAIT = 60.0
LONGEST_TRY = 86_400.0
"""Seconds (a day): a socket refuses very large numbers."""


class NoAnswer(Exception):
    """The endpoint gave no answer to this question; another may succeed."""


@dataclass(frozen=True)
class Endpoint:
    """Where to ask.

    Attributes:
        base_url: without ``/chat/completions``, such as ``http://localhost:8000/v1``.
        model: its name at the endpoint.
        key: sent as a bearer token if given; never written to a file.
        timeout: seconds for one try.
        tries: of one question; the wait between them starts at ``first_wait`` seconds and doubles each time.
    """

    base_url: str
    model: str
    key: str | None = field(default=None, repr=False)
    timeout: float = 60.0
    tries: int = 4
    first_wait: float = 1.0
    max_tokens: int = 256

    def __post_init__(self) -> None:
        if not _is_address(self.base_url):
            raise UserError(
                f"endpoint: got '{self.base_url}', expected an address such as http://localhost:8000/v1"
            )
        if self.key is not None and not (self.key.isascii() and self.key.isprintable()):
            raise UserError("key: holds characters that a header cannot contain, perhaps a line break")
        if self.tries < 1:
            raise UserError(f"tries: got {self.tries}, expected at least 1")
        if not 0 < self.timeout <= LONGEST_TRY:  # nan fails too
            raise UserError(
                f"timeout: got {self.timeout}, expected seconds above 0 and at most {LONGEST_TRY:g}"
            )

    def ask(self, messages: Sequence[Message]) -> str:
        """The text of the answer, at temperature 0.

        Raises:
            NoAnswer: if all ``tries`` fail, the answer has no text, or this question is refused.
            UserError: if the endpoint refuses every question (wrong key, model or address).
        """
        body = {"model": self.model, "messages": list(messages), "temperature": 0}
        request = urllib.request.Request(
            f"{self.base_url.rstrip('/')}/chat/completions",
            data=json.dumps(body | {"max_tokens": self.max_tokens}).encode(),
            headers={"Content-Type": "application/json"}
            | ({"Authorization": f"Bearer {self.key}"} if self.key else {}),
        )
        failed = 0
        while True:
            try:
                return self._send(request)
            except _Passing as passing:
                failed += 1
                if failed == self.tries:
                    raise NoAnswer(f"no answer in {failed} tries: {passing}") from passing
                time.sleep(min(LONGEST_WAIT, passing.wait or self.first_wait * 2 ** (failed - 1)))

    def _send(self, request: urllib.request.Request) -> str:
        try:
            with urllib.request.urlopen(request, timeout=self.timeout) as response:
                return _content(response.read())
        except urllib.error.HTTPError as error:
            if error.code in RETRIED:
                raise _Passing(f"HTTP {error.code}", error.headers.get("Retry-After")) from error
            message = f"{request.full_url}: HTTP {error.code} ({_reason(error)})"
            raise (UserError if error.code in REFUSED else NoAnswer)(message) from error
        except (OSError, http.client.HTTPException) as error:
            raise _Passing(str(error) or type(error).__name__) from error


def _is_address(url: str) -> bool:
    """Whether a request can be sent there; urllib takes a malformed one for an endpoint that is down."""
    try:
        parts = urllib.parse.urlsplit(url)
        has_place = parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # a port that is no number, half a bracket
        return False
    return has_place and url.isascii() and url.isprintable() and " " not in url


class _Passing(Exception):
    """An error that may be temporary, and the seconds that the endpoint asks to wait."""

    def __init__(self, message: str, wait: str | None = None) -> None:
        super().__init__(message)
        self.wait = float(wait) if wait and wait.isdecimal() else None


def _reason(error: urllib.error.HTTPError) -> str:
    """The endpoint's own explanation, if it sends one."""
    try:
        return error.read()[:200].decode(errors="replace") or error.reason
    except (OSError, http.client.HTTPException):
        return error.reason


def _content(body: bytes) -> str:
    try:
        content = json.loads(body)["choices"][0]["message"]["content"]
    except (ValueError, LookupError, TypeError) as error:
        raise NoAnswer(f"not a chat completion: {body[:80]!r}") from error
    if not isinstance(content, str) or not content.strip():
        raise NoAnswer("an answer without text")
    return content


class Cached:
    """Asks each question once: answers are appended to ``path`` as they come, one line of JSON each."""

    def __init__(self, endpoint: Endpoint, path: Path) -> None:
        self.endpoint, self.path = endpoint, path
        self.answers = _read(path) if path.is_file() else {}

    def ask(self, messages: Sequence[Message]) -> str:
        """As ``Endpoint.ask``; failures are not kept, so that a later run asks again."""
        where = [self.endpoint.base_url, self.endpoint.model, list(messages)]
        key = hashlib.sha256(json.dumps(where, sort_keys=True).encode()).hexdigest()
        if key not in self.answers:
            self.answers[key] = self.endpoint.ask(messages)
            self._append({"key": key, "answer": self.answers[key]})
        return self.answers[key]

    def _append(self, line: dict[str, Any]) -> None:
        """Start a new line first: a killed run may have left one half written."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("a", encoding="utf-8") as stream:
            stream.write(f"\n{json.dumps(line)}\n")  # ASCII: an answer may hold an unpaired surrogate


def _read(path: Path) -> dict[str, str]:
    answers, damaged = {}, 0
    for text in filter(str.strip, path.read_text(encoding="utf-8", errors="replace").split("\n")):
        try:
            line = json.loads(text)
            answers[line["key"]] = line["answer"]
        except (ValueError, LookupError, TypeError):
            damaged += 1
    if damaged:
        logger.warning("%s: %d damaged lines are left out and asked again", path, damaged)
    return answers
