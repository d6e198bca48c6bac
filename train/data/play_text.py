"""One play in Markdown to scenes of turns.

``# Title``, ``## ACT``, ``### SCENE`` are headings, ``**SPEAKER**`` opens a turn, blank lines end paragraphs,
``_stage directions_`` (also ``*so*``, and bracketed inside a turn) are not spoken. The real files have slips
that are mended here: a heading printed as a speaker tag (``**Scene III**``), a direction without its opening
mark (``[Aside]_``), a tag broken over two lines (``BISHOP``, blank, ``**OF WINCHESTER**``), a missing title,
and the rest of a long heading or a song before anybody is named (nobody speaks it, so it is dropped).
"""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from train.data.transcript import Scene, Turn, merge_turns
from train.errors import UserError
from train.files import read_text

HEADING = re.compile(r"#{1,6}\s*(.+)|\*\*(scene\s+[ivxlc]+)\*\*\s*(.*)", re.IGNORECASE | re.DOTALL)
TAG = re.compile(r"\*\*([^*\n]+)\*\*[ \t]*(?:\n|$)")
BRACKETED = re.compile(r"[_*]*\\?\[[^\]]*\][_*]+")
WHOLE_DIRECTION = re.compile(
    r"([_*])(?!\*)(?:(?!  \n).)+\1", re.DOTALL
)  # turns, unlike these, have hard breaks
DIRECTION = re.compile(r"([_*])(?:(?!\1).)+\1", re.DOTALL)
ROMAN = re.compile(r"[IVXLC]+$")
SMALL_WORDS = {"OF", "LA", "THE", "DE"}


@dataclass
class _Script:
    """The scenes read so far and the one being read."""

    source: str
    act: str = ""
    title: str = ""
    scenes: list[Scene] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def open_scene(self, heading: str) -> None:
        self.close_scene()
        if heading.upper().startswith("ACT "):
            self.act, self.title = heading, ""
        else:
            self.title = heading

    def close_scene(self) -> None:
        turns = merge_turns(self.turns)
        if turns:
            title = ", ".join(part for part in (self.act, self.title) if part)
            self.scenes.append(Scene(self.source, title, turns))
        self.turns = []


def parse_play(path: Path) -> list[Scene]:
    """The scenes of the play in ``path``, speakers named as printed but in title case.

    Raises ``UserError`` naming file and line: undecodable, empty, no speaker tag, a broken tag, a stage
    direction that is not closed.
    """
    paragraphs = list(_paragraphs(read_text(path)))
    title = paragraphs[0][1]
    script = _Script(title[2:].strip() if title.startswith("# ") else path.stem.replace("-", " ").title())
    for line, paragraph in paragraphs:
        try:
            _read_paragraph(script, paragraph)
        except UserError as error:
            raise UserError(f"{path}:{line}: {error}") from None
    script.close_scene()
    if not script.scenes:
        raise UserError(f"{path}: no speaker tag ('**NAME**') with text in the whole file")
    return script.scenes


def _paragraphs(text: str) -> Iterator[tuple[int, str]]:
    """(first line number, text) of every block between blank lines; headings and tags open a block."""
    line, counted = 1, 0
    for match in re.finditer(r"^#.*|^.*\S.*(?:\n(?!#|\*\*).*\S.*)*", text, re.MULTILINE):
        line += text.count("\n", counted, match.start())
        counted = match.start()
        yield line, match.group().strip()


def _read_paragraph(script: _Script, paragraph: str) -> None:
    heading = HEADING.fullmatch(paragraph)
    if heading:
        script.open_scene(" ".join(part.strip() for part in heading.groups() if part))
        return
    tag = TAG.match(paragraph)
    if paragraph.startswith("**") and not tag:
        raise UserError(f"broken speaker tag {_first_line(paragraph)}, expected '**NAME**' on its own line")
    if tag:
        script.turns.append(Turn(_full_name(script, tag[1]), _spoken(paragraph[tag.end() :])))
        return
    text = _spoken(paragraph)
    if text and script.turns:
        script.turns.append(Turn(script.turns[-1].speaker, text))


def _full_name(script: _Script, tag: str) -> str:
    """The name in ``tag``; if it starts with "of", the part before is the last line of the turn before."""
    if tag.upper().startswith("OF ") and script.turns:
        last = script.turns.pop()
        spoken, _, rank = last.text.rpartition(" ")
        script.turns.append(Turn(last.speaker, spoken))
        tag = f"{rank} {tag}"
    return speaker_name(tag)


def speaker_name(tag: str) -> str:
    """A printed tag in title case: ``KING HENRY IV`` is ``King Henry IV``; members of a group are sorted."""
    members = [member.strip(" :") for member in tag.split("&")]
    return " & ".join(sorted(" ".join(map(_title_word, member.split())) for member in members if member))


def _title_word(word: str) -> str:
    if ROMAN.match(word):
        return word
    return word.lower() if word.upper() in SMALL_WORDS else word[0].upper() + word[1:].lower()


def _spoken(paragraph: str) -> str:
    """``paragraph`` on one line without stage directions; a word broken at a hyphen is joined."""
    if WHOLE_DIRECTION.fullmatch(paragraph):
        return ""
    text = DIRECTION.sub("", BRACKETED.sub("", paragraph))
    if "_" in text or "*" in text:
        raise UserError(f"a stage direction or tag is not closed: {_first_line(paragraph)}")
    text = re.sub(r"(?<=[a-z])-\s*\n\s*(?=[a-z])", "-", text.replace("\\", ""))
    return " ".join(text.split())


def _first_line(paragraph: str) -> str:
    return repr(paragraph.splitlines()[0].strip())
