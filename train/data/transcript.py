"""Scenes of speaker turns, read from a transcript.

JSON lines: ``{"scene": str, "speaker": str, "text": str}``; adjacent lines of one scene belong together. The
scene may be a whole number.

Markdown: a heading opens a scene, ``**Speaker:** text`` a turn, which goes on over the lines that follow; a
line that is ``*one emphasis*`` is a stage direction, and is left out, as are rules (``---``) and
``<!-- comments -->``.

CSV: a header that names the same three columns, or others that stand for them.
"""

import csv
import io
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

from train.data.names import check_name, plain_name
from train.errors import UserError
from train.files import read_text

Row = tuple[str, str, str]
KEYS = ("scene", "speaker", "text")
MARKDOWN = (".md", ".markdown")
CSV = ".csv"
JSON_LINES = (".jsonl", ".ndjson", ".json")
"""Under these nobody means another kind of file; every other suffix is read as JSON lines, too."""
HEADING = re.compile(r"#{1,6}[ \t]+(.+)")
SPEECH = re.compile(r"\*\*\s*([^*]+?)\s*(?:[:：]\s*\*\*|\*\*\s*[:：])\s*(.*)")
MARKED_SPEECH = re.compile(rf"(?:[>+-]|\*(?=\s)|\d+[.)])\s*{SPEECH.pattern}")
RULE = re.compile(r"([-*_])[ \t]*(?:\1[ \t]*){2,}")
DIRECTION = re.compile(
    r"\*(?![*\s])(?:[^*]|\*\*[^*]+\*\*)+\*|_(?![_\s])(?:[^_]|(?<=\w)_(?=\w))+_"
    r"|([*_])\1\1[^*_\s:：](?:[^*_:：]*[^*_\s:：])?\1{3}"  # with a colon it is a speaker that is broken
)
COMMENT = re.compile(r"(?<![ \t])([ \t]*)<!--.*?-->([ \t]*)", re.DOTALL)
UNDERLINE = re.compile(r"=+|-{3,}")
LINE_END = re.compile(r"\r\n?")
"""Of Windows, and of old Macs."""
HALF_A_CHARACTER = re.compile(r"[\ud800-\udfff]")
"""An unpaired surrogate: JSON can escape it, but no UTF-8 file can hold it."""
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
    """The scenes of a transcript: Markdown or CSV by its suffix, else JSON lines.

    Speakers are called by their :func:`~train.data.names.plain_name`.

    Args:
        path: the transcript.
        columns: of a CSV file, the column of the ``scene``, ``speaker`` or ``text`` if it has another name.

    Raises:
        UserError: naming file and line for what cannot be read, or a name that
            :func:`~train.data.names.check_name` refuses; if nobody says anything in it.
    """
    scenes = [
        Scene(path.stem, title, merge_turns([Turn(speaker, text) for _, speaker, text in group]))
        for title, group in groupby(_rows(path, columns or {}), key=lambda row: row[0])
    ]
    scenes = [scene for scene in scenes if scene.turns]
    if not scenes:
        raise UserError(f"{path}: nobody says anything in it")
    return scenes


def _rows(path: Path, columns: Mapping[str, str]) -> Iterator[Row]:
    """(scene, speaker, text) of every line."""
    text, suffix = read_text(path), path.suffix.lower()
    if suffix == CSV:
        return _csv_rows(path, text, columns)
    if columns:
        raise UserError(f"{path}: only a CSV file has columns to name, got {', '.join(columns.values())}")
    is_markdown = suffix in MARKDOWN
    if is_markdown:
        text = _without_comments(path, LINE_END.sub("\n", text))
    lines = enumerate(text.split("\n"), start=1)  # not splitlines: a JSON text may hold U+2028
    return _markdown_rows(path, lines) if is_markdown else _json_rows(path, lines)


def _csv_rows(path: Path, text: str, columns: Mapping[str, str]) -> Iterator[Row]:
    """(scene, speaker, text) of every record."""
    table = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    try:
        names = _column_names(path, table.fieldnames or (), columns)
        for record in table:
            scene, speaker, said = (record[name] for name in names)
            if None in record or None in (scene, speaker, said):
                count = "more" if None in record else "fewer"
                raise UserError(f"{path}:{table.line_num}: {count} fields than the header has")
            if not (name := plain_name(speaker)):
                raise UserError(f"{path}:{table.line_num}: column '{names[1]}' is empty")
            check_name(name, f"{path}:{table.line_num}")
            yield scene, name, " ".join(said.splitlines())
    except csv.Error as error:
        raise UserError(f"{path}: not CSV after line {table.line_num} ({error})") from error


def _column_names(path: Path, header: Sequence[str], columns: Mapping[str, str]) -> list[str]:
    names = [columns.get(key, key) for key in KEYS]
    for key, name in zip(KEYS, names, strict=True):
        if name not in header:
            raise UserError(
                f"{path}: no column '{name}' for the {key}, there are {', '.join(header)}; "
                f"--column {key}=NAME takes another"
            )
    return names


def _json_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """(scene, speaker, text) of every line."""
    for number, line in lines:
        if line.strip():
            row = _parse_line(path, number, line)
            yield row["scene"], row["speaker"], row["text"]


def _without_comments(path: Path, text: str) -> str:
    """``text`` without its comments, with as many lines, and one space where there was any beside them."""

    def replaced(comment: re.Match[str]) -> str:
        return "\n" * comment[0].count("\n") or " " * bool(comment[1] or comment[2])

    text = COMMENT.sub(replaced, text)
    before, opened, _ = text.partition("<!--")
    if opened:
        raise UserError(f"{path}:{before.count(chr(10)) + 1}: a comment that does not end, expected '-->'")
    return text


def _markdown_rows(path: Path, lines: Iterable[tuple[int, str]]) -> Iterator[Row]:
    """(scene, speaker, text) of every line; scenes are numbered, so that equal headings stay apart."""
    scene, speaker, number_of_scenes = path.stem, None, 0
    goes_on = False  # whether the line before continues a turn, or is a heading that dashes underline
    unsaid = 0  # the line of a turn that has no text yet
    for number, line in ((number, line.strip()) for number, line in lines):
        is_underline = UNDERLINE.fullmatch(line) and (goes_on or line.startswith("="))
        goes_on = False
        if RULE.fullmatch(line) and not is_underline:
            continue
        heading, speech = HEADING.fullmatch(line), SPEECH.fullmatch(line)
        if unsaid and (heading or speech):
            raise _nothing_said(path, unsaid)
        if heading:
            number_of_scenes += 1
            scene, speaker = f"{number_of_scenes} {heading[1]}", None
        elif speech and (name := plain_name(speech[1])):
            speaker = name
            check_name(speaker, f"{path}:{number}")
            unsaid = 0 if speech[2] else number
            yield scene, speaker, speech[2]
        elif DIRECTION.fullmatch(line):
            continue
        elif line.startswith("**") or MARKED_SPEECH.match(line):
            raise UserError(f"{path}:{number}: broken speaker {line[:40]!r}, expected '**Name:** text'")
        elif is_underline:
            raise UserError(
                f"{path}:{number}: an underlined heading, expected '## Scene'; a rule has an empty line above"
            )
        elif line:
            if speaker is None:
                raise UserError(
                    f"{path}:{number}: nobody speaks here; expected '**Name:** text' or '## Scene'"
                )
            goes_on, unsaid = True, 0
            yield scene, speaker, line
    if unsaid:
        raise _nothing_said(path, unsaid)


def _nothing_said(path: Path, number: int) -> UserError:
    """The turns around it would become one if it were left out."""
    return UserError(
        f"{path}:{number}: nothing is said in this turn, expected text behind the name or in the next line"
    )


def _parse_line(path: Path, number: int, line: str) -> dict[str, str]:
    try:
        row = json.loads(line)
    except json.JSONDecodeError as error:
        raise _no_turn(path, number, f"not JSON ({error.msg} at column {error.colno})") from error
    except RecursionError as error:
        raise _no_turn(path, number, "not JSON of a turn (brackets too deep)") from error
    except ValueError as error:  # no error of syntax, but a number longer than Python converts
        raise _no_turn(path, number, "not JSON of a turn (a number is too long)") from error
    if not isinstance(row, dict):
        raise _no_turn(path, number, f"expected an object with the keys {', '.join(KEYS)}")
    if type(row.get("scene")) is int:
        row["scene"] = str(row["scene"])
    for key in KEYS:
        if key not in row:
            raise UserError(f"{path}:{number}: key '{key}' is missing")
        if not isinstance(row[key], str):
            expected = "a text or a whole number" if key == "scene" else "a text"
            raise UserError(
                f"{path}:{number}: key '{key}': got {json.dumps(row[key])[:40]}, expected {expected}"
            )
        if half := HALF_A_CHARACTER.search(row[key]):
            raise UserError(f"{path}:{number}: key '{key}' holds half a character ({half[0]!a})")
    if not (name := plain_name(row["speaker"])):
        raise UserError(f"{path}:{number}: key 'speaker' is empty")
    check_name(name, f"{path}:{number}")
    return row | {"speaker": name}


def _no_turn(path: Path, number: int, problem: str) -> UserError:
    """What is wrong with a line; perhaps that it is none of JSON lines, but of another kind of file."""
    read_as = " (read as JSON lines because of its suffix; Markdown is .md, CSV .csv)"
    return UserError(f"{path}:{number}: {problem}{'' if path.suffix.lower() in JSON_LINES else read_as}")
