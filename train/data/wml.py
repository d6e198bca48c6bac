"""Who says what in the scenario files of The Battle for Wesnoth, written in its markup language (WML).

A file is tags (``[message] ... [/message]``) with ``key=value`` lines; a text for players is ``_ "text"``,
looked up in the catalogue of the current ``#textdomain``. Macros (``{NAME ...}``) are not expanded.
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

TOKEN = re.compile(
    r"""
    <<.*?>>                                        # Lua
    | \#textdomain[ \t]+(?P<domain>\S+)
    | (?P<branch>\#else\b)
    | \#[^\n]*
    | \[(?P<close>/?)\+?(?P<tag>\w+)\]
    | (?P<translatable>\b_[ \t]*)?"(?P<string>(?:[^"]|"")*)"
    | (?P<key>\w+(?:,\w+)*)[ \t]*=
    | (?P<newline>\n)
    | (?P<word>[^\s"\#\[<]+|.)
    """,
    re.DOTALL | re.VERBOSE,
)
ALTERNATIVES = {"else", "elseif", "case", "option"}
BOUNDARIES = {"event", "scenario"}


@dataclass(frozen=True)
class Text:
    """A text for players, as in the catalogue of ``domain``."""

    domain: str
    value: str


@dataclass(frozen=True)
class Message:
    """Something that is said; ``speaker`` is an id, or a word such as ``narrator`` or ``unit``, or None."""

    speaker: str | None
    texts: tuple[Text, ...]


@dataclass(frozen=True)
class Name:
    """What players call the unit or side ``id``."""

    id: str
    text: Text


@dataclass(frozen=True)
class Break:
    """What follows does not continue what came before: another event, or another branch of one."""


@dataclass
class _Tag:
    name: str
    values: dict[str, str] = field(default_factory=dict)
    texts: dict[str, list[Text]] = field(default_factory=dict)
    is_told: bool = False

    def tell(self) -> Iterator[Message | Name]:
        """What this tag says of somebody, once."""
        if self.name == "message" and not self.is_told and "message" in {*self.values, *self.texts}:
            self.is_told = True
            speaker = self.values.get("speaker", self.values.get("id"))
            yield Message(speaker, tuple(self.texts.get("message", ())))
        elif self.name != "message" and "id" in self.values and "name" in self.texts:
            yield Name(self.values["id"], self.texts["name"][0])


def read_wml(text: str) -> Iterator[Message | Name | Break]:
    """Messages, names and breaks in the order of the file."""
    stack: list[_Tag] = []
    key, continues, domain = None, False, "wesnoth"
    for token in TOKEN.finditer(text):
        if token["domain"]:
            domain = token["domain"]
        elif token["tag"]:
            key = None
            yield from _close(stack, token["tag"]) if token["close"] else _open(stack, token["tag"])
        elif token["branch"]:
            yield Break()
        elif token["key"] and (key is None or not continues):
            key, continues = token["key"], False
        elif token["newline"]:
            key = key if continues else None
        elif key is not None and stack and (token["string"] is not None or token["word"]):
            continues = token["word"] == "+"
            _add(stack[-1], key, token, domain)


def _open(stack: list[_Tag], name: str) -> Iterator[Message | Name | Break]:
    if stack and stack[-1].name == "message":  # its options come after it
        yield from stack[-1].tell()
    if name in BOUNDARIES | ALTERNATIVES:
        yield Break()
    stack.append(_Tag(name))


def _close(stack: list[_Tag], name: str) -> Iterator[Message | Name | Break]:
    """Macros may open tags that they do not close, so everything inside ``name`` is closed too."""
    if any(tag.name == name for tag in stack):
        while stack[-1].name != name:
            stack.pop()
        yield from stack.pop().tell()
    if name in BOUNDARIES:
        yield Break()


def _add(tag: _Tag, key: str, token: re.Match[str], domain: str) -> None:
    """A piece of the value of ``key``: texts for players apart from everything else."""
    if token["translatable"]:
        tag.texts.setdefault(key, []).append(Text(domain, token["string"].replace('""', '"')))
    else:
        piece = token["word"] if token["string"] is None else token["string"]
        tag.values[key] = f"{tag.values.get(key, '')} {piece}".strip()
