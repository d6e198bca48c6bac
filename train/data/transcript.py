"""Scenes of speaker turns, and the JSON-lines transcript that holds them.

A transcript line is ``{"scene": str, "speaker": str, "text": str}``; neighbouring lines of one scene belong
together.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from train.errors import UserError
from train.files import read_text

TRANSCRIPT_KEYS = ("scene", "speaker", "text")


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
    """Join neighbouring turns of one speaker with a space; turns without text disappear."""
    spoken = [turn for turn in turns if turn.text.strip()]
    return tuple(
        Turn(speaker, " ".join(turn.text.strip() for turn in group))
        for speaker, group in groupby(spoken, key=lambda turn: turn.speaker)
    )


def read_transcript(path: Path) -> list[Scene]:
    """Read a JSON-lines transcript; a damaged line is a ``UserError`` naming file and line."""
    rows = [
        _parse_line(path, number, line)
        for number, line in enumerate(read_text(path).splitlines(), start=1)
        if line.strip()
    ]
    return [
        Scene(path.stem, title, merge_turns([Turn(row["speaker"].strip(), row["text"]) for row in group]))
        for title, group in groupby(rows, key=lambda row: row["scene"])
    ]


def _parse_line(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{number}: not JSON ({error.msg} at column {error.colno})") from error
    if not isinstance(row, dict):
        raise UserError(f"{path}:{number}: expected an object with the keys {', '.join(TRANSCRIPT_KEYS)}")
    for key in TRANSCRIPT_KEYS:
        if not isinstance(row.get(key), str):
            raise UserError(f"{path}:{number}: key '{key}' is missing or not a string")
    if not row["speaker"].strip():
        raise UserError(f"{path}:{number}: key 'speaker' is empty")
    return row
