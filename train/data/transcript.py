"""Scenes of speaker turns, and how a transcript becomes them (formats: :mod:`train.data.transcript_rows`)."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from train.data.transcript_rows import rows
from train.errors import UserError

WITHOUT_SPACES = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")
PUNCTUATION = re.compile(r"[\u2014\u2018-\u201d\u2026]")  # in both kinds of script: quotes, dash, ellipsis


@dataclass(frozen=True)
class Turn:
    """What one speaker says before somebody else speaks."""

    speaker: str
    text: str


@dataclass(frozen=True)
class Scene:
    """Consecutive turns at one place and time; ``source`` is the play or transcript it is from."""

    source: str
    title: str
    turns: tuple[Turn, ...]


def merge_turns(turns: Sequence[Turn]) -> tuple[Turn, ...]:
    """Join adjacent turns of one speaker; turns without text disappear."""
    spoken = [turn for turn in turns if turn.text.strip()]
    return tuple(
        Turn(speaker, join_texts([turn.text for turn in group]))
        for speaker, group in groupby(spoken, key=lambda turn: turn.speaker)
    )


def join_texts(texts: Sequence[str]) -> str:
    """``texts`` in one line, with a space between two unless both sides are Chinese or Japanese."""
    joined = ""
    for text in filter(None, (text.strip() for text in texts)):
        sides = [_is_unspaced(reversed(joined)), _is_unspaced(text)]
        is_tight = True in sides and False not in sides
        joined += text if is_tight or not joined else f" {text}"
    return joined


def _is_unspaced(text: Iterable[str]) -> bool | None:
    """Whether ``text`` begins in a script without spaces, after punctuation that all scripts share."""
    first = next((one for one in text if not PUNCTUATION.match(one)), None)
    return None if first is None else bool(WITHOUT_SPACES.match(first))


def read_transcript(path: Path, columns: Mapping[str, str] | None = None) -> list[Scene]:
    """The scenes of a transcript; arguments and errors as in :func:`train.data.transcript_rows.rows`.

    A transcript in which nobody says anything is a ``UserError`` too.
    """
    scenes = [
        Scene(path.stem, title, merge_turns([Turn(speaker, text) for _, speaker, text in group]))
        for title, group in groupby(rows(path, columns or {}), key=lambda row: row[0])
    ]
    scenes = [scene for scene in scenes if scene.turns]
    if not scenes:
        raise UserError(f"{path}: nobody says anything in it")
    return scenes
