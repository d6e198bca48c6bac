"""Dialogues of The Battle for Wesnoth's campaigns, in English or a translation, as a transcript.

The campaigns (Debian: ``wesnoth-1.16-httt`` and its sisters) are under the GPL, version 2 or later; this
reads the files on the user's machine and ships none of their text.

python -m train.data.wesnoth --language zh_CN --out data/wesnoth-zh_CN.jsonl
python -m train.data.build --transcript data/wesnoth-zh_CN.jsonl --list-speakers
"""

import argparse
import gettext
import json
import re
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from rich.console import Console

from train.cli import run
from train.data.names import short_name
from train.data.transcript import Scene, Turn, join_texts, merge_turns
from train.data.wml import Break, Message, Name, Text, read_wml
from train.errors import UserError
from train.files import read_text, write_atomic

ROOT = Path("/usr/share/games/wesnoth/1.16")
ENGLISH = "en"
NARRATOR = "narrator"
WHOEVER = {"unit", "second_unit"}
"""Speakers whom only the game knows: the unit that moved, fought or died."""
MARKUP = re.compile(r"</?\w[^>]*>")
VARIABLE = re.compile(r"\$\w|[{}]")
SEVERAL = ","
"""Between ids: the first of them who is still alive speaks."""
APOSTROPHES = str.maketrans("'", "’")


class _Missing(gettext.NullTranslations):
    """Gives an empty text where a catalogue has no translation."""

    def gettext(self, message: str) -> str:
        return ""


def _catalogue(path: Path) -> gettext.GNUTranslations:
    try:
        with path.open("rb") as stream:
            found = gettext.GNUTranslations(stream)
    except (OSError, struct.error, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not a catalogue of translations ({error})") from error
    found.add_fallback(_Missing())
    return found


class Translator:
    """Texts in one language, from the catalogues (``*.mo``) below a folder."""

    def __init__(self, root: Path, language: str) -> None:
        self._catalogues: dict[str, gettext.GNUTranslations] | None = None
        if language == ENGLISH:
            return
        self._catalogues = {}
        for path in sorted(root.rglob(f"{language}/LC_MESSAGES/*.mo")):
            self._catalogues[path.stem] = _catalogue(path)
        if not self._catalogues:
            known = sorted({path.parts[-3] for path in root.rglob("*/LC_MESSAGES/*.mo")})
            raise UserError(f"{root}: no translations into '{language}', only {', '.join([ENGLISH, *known])}")

    def __call__(self, text: Text) -> str:
        """``text`` in one line without markup; empty where it is not translated, or names a variable."""
        found = text.value
        if self._catalogues is not None:
            catalogue = self._catalogues.get(text.domain)
            found = catalogue.gettext(text.value) if catalogue else ""
        found = found.partition("^")[2] or found  # "whisper^Hush!": what comes before is for translators
        return "" if VARIABLE.search(found) else " ".join(MARKUP.sub("", found).split())


@dataclass
class _Story:
    """Scenes of one file, and the turns since the last break."""

    source: str
    title: str
    scenes: list[Scene] = field(default_factory=list)
    turns: list[Turn] = field(default_factory=list)

    def end_scene(self) -> None:
        turns = merge_turns(self.turns)
        if turns:
            self.scenes.append(Scene(self.source, f"{self.title} {len(self.scenes) + 1}", turns))
        self.turns = []


def read_campaigns(root: Path, language: str = ENGLISH, campaigns: Iterable[str] = ()) -> list[Scene]:
    """Scenes of the campaigns below ``root``: those whose folders are named, or all.

    What one event says is a scene. The narrator is left out; a line whose speaker or words only the running
    game knows, or that is not translated, ends the scene. Raises ``UserError`` if nothing is found.
    """
    folders = {path.name: path for path in sorted(root.rglob("data/campaigns/*")) if path.is_dir()}
    if not folders:
        raise UserError(
            f"{root}: no campaigns (data/campaigns/*); install wesnoth-1.16-httt, or name a folder"
        )
    for name in campaigns:
        if name not in folders:
            raise UserError(f"{root}: no campaign '{name}', only {', '.join(folders)}")
    translate = Translator(root, language)
    chosen = [folders[name] for name in campaigns or folders]
    return [scene for folder in chosen for scene in _read_campaign(folder, translate)]


def _read_campaign(folder: Path, translate: Translator) -> list[Scene]:
    files = {path: list(read_wml(read_text(path))) for path in sorted(folder.rglob("*.cfg"))}
    names = _names((item for items in files.values() for item in items), translate)
    scenes = []
    for path, items in files.items():
        story = _Story(folder.name, f"{folder.name}/{path.stem}")
        for item in items:
            if isinstance(item, Break):
                story.end_scene()
            elif isinstance(item, Message) and item.speaker != NARRATOR:
                _say(story, item, names, translate)
        story.end_scene()
        scenes += story.scenes
    return scenes


def _names(items: Iterable[Message | Name | Break], translate: Translator) -> dict[str, str]:
    """What players call the speakers; a campaign names nearly all of them by a translated id."""
    names: dict[str, str] = {}
    domains: set[str] = set()
    speakers: set[str] = set()
    for item in items:
        if isinstance(item, Name):
            name = translate(item.text)
            if short_name(name):  # some are called "?" until they are known
                names.setdefault(item.id, name)
        elif isinstance(item, Message):
            domains |= {text.domain for text in item.texts}
            speakers |= {item.speaker or ""}
    for speaker in sorted(speakers):
        spellings = {speaker: None, speaker.translate(APOSTROPHES): None}
        texts = (Text(domain, spelling) for domain in sorted(domains) for spelling in spellings)
        names[speaker] = names.get(speaker) or next(filter(None, map(translate, texts)), speaker)
    return names


def _say(story: _Story, message: Message, names: dict[str, str], translate: Translator) -> None:
    said = [translate(text) for text in message.texts]
    if not _is_known(message.speaker) or not said or not all(said):
        story.end_scene()
    else:
        story.turns.append(Turn(names[message.speaker], join_texts(said)))


def _is_known(speaker: str | None) -> bool:
    return (
        bool(speaker) and speaker not in WHOEVER and SEVERAL not in speaker and not VARIABLE.search(speaker)
    )


def transcript_lines(scenes: Iterable[Scene]) -> Iterator[str]:
    """``scenes`` as the lines of a transcript, see :mod:`train.data.transcript`."""
    for scene in scenes:
        for turn in scene.turns:
            line = {"scene": scene.title, "speaker": turn.speaker, "text": turn.text}
            yield json.dumps(line, ensure_ascii=False)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--root", type=Path, default=ROOT, help="the game's or an unpacked package's folder")
    parser.add_argument(
        "--language", default=ENGLISH, help="en, zh_CN, zh_TW, de, ... (default: %(default)s)"
    )
    parser.add_argument("--campaign", action="append", default=[], help="a folder's name; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="the transcript, a .jsonl file")
    arguments = parser.parse_args()
    scenes = read_campaigns(arguments.root, arguments.language, arguments.campaign)
    write_atomic(arguments.out, "\n".join(transcript_lines(scenes)) + "\n")
    counts = groupby(scenes, key=lambda scene: scene.source)
    console = Console()
    for source, found in counts:
        turns = [turn for scene in found for turn in scene.turns]
        speakers = {turn.speaker for turn in turns}
        console.print(f"{source}: {len(turns)} turns of {len(speakers)} speakers", markup=False)
    console.print(str(arguments.out), soft_wrap=True, markup=False)


if __name__ == "__main__":
    run(main)
