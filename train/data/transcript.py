"""Scenes of speaker turns, and the two kinds of transcript that hold them.

JSON lines: ``{"scene": str, "speaker": str, "text": str}``; neighbouring lines of one scene belong together.

Markdown: a heading opens a scene, ``**Speaker:** text`` a turn, which goes on over the lines that follow; a
line that is ``*one emphasis*`` is a stage direction, and is left out.
"""

import json
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from train.errors import UserError
from train.files import read_text

TRANSCRIPT_KEYS = ("scene", "speaker", "text")
MARKDOWN = (".md", ".markdown")
HEADING = re.compile(r"#{1,6}[ \t]+(.+)")
SPEECH = re.compile(r"\*\*\s*([^*]+?)\s*(?:[:：]\s*\*\*|\*\*\s*[:：])\s*(.*)")
DIRECTION = re.compile(r"([*_])(?!\1)[^*_]+\1")
WITHOUT_SPACES = re.compile(r"[\u3000-\u30ff\u3400-\u9fff\uff00-\uffef]")


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
    """Join neighbouring turns of one speaker; turns without text disappear."""
    spoken = [turn for turn in turns if turn.text.strip()]
    return tuple(
        Turn(speaker, join_texts([turn.text for turn in group]))
        for speaker, group in groupby(spoken, key=lambda turn: turn.speaker)
    )


def join_texts(texts: Sequence[str]) -> str:
    """``texts`` in one line, with a space between two unless both sides are Chinese or Japanese."""
    joined = ""
    for text in filter(None, (text.strip() for text in texts)):
        is_tight = WITHOUT_SPACES.match(joined[-1:]) and WITHOUT_SPACES.match(text)
        joined += text if is_tight or not joined else f" {text}"
    return joined


def read_transcript(path: Path) -> list[Scene]:
    """The scenes of a transcript, Markdown by its suffix, else JSON lines.

    Raises ``UserError`` naming file and line for what cannot be read.
    """
    lines = enumerate(read_text(path).splitlines(), start=1)
    read = _markdown_rows if path.suffix.lower() in MARKDOWN else _json_rows
    scenes = [
        Scene(path.stem, title, merge_turns([Turn(speaker, text) for _, speaker, text in group]))
        for title, group in groupby(read(path, lines), key=lambda row: row[0])
    ]
    return [scene for scene in scenes if scene.turns]


def _json_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, str, str]]:
    """(scene, speaker, text) of every line."""
    for number, line in lines:
        if line.strip():
            row = _parse_line(path, number, line)
            yield row["scene"], row["speaker"].strip(), row["text"]


def _markdown_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[tuple[str, str, str]]:
    """(scene, speaker, text) of every line; scenes are numbered, so that equal headings stay apart."""
    scene, speaker, number_of_scenes = path.stem, None, 0
    for number, line in ((number, line.strip()) for number, line in lines):
        heading, speech = HEADING.fullmatch(line), SPEECH.fullmatch(line)
        if heading:
            number_of_scenes += 1
            scene, speaker = f"{number_of_scenes} {heading[1]}", None
        elif speech:
            speaker = speech[1]
            yield scene, speaker, speech[2]
        elif line.startswith("**"):
            raise UserError(f"{path}:{number}: broken speaker {line[:40]!r}, expected '**Name:** text'")
        elif line and not DIRECTION.fullmatch(line):
            if speaker is None:
                raise UserError(
                    f"{path}:{number}: nobody speaks here; expected '**Name:** text' or '## Scene'"
                )
            yield scene, speaker, line


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
