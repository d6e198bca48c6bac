"""From a show and a responder to a finished MQDialog folder: ``prepare(PrepareConfig) -> Path``.

Also a command line: ``python -m train.data.prepare --show plays --responder Falstaff --out data``.
"""

import argparse
import json
import logging
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from rich.console import Console

from train.cli import run
from train.data.cluster import cluster_queries
from train.data.dialogue import PLAY_THRESHOLDS, Thresholds, split_queriers
from train.data.layout import PAIR_IDS, Example, MQDialog, responder_folder, short_name
from train.data.mqdialog import load_mqdialog, write_mqdialog
from train.data.planted import RESPONDER as PLANTED_RESPONDER
from train.data.planted import SHOW as PLANTED
from train.data.planted import planted
from train.data.plays import read_plays
from train.data.summary import summary_table
from train.data.transcript import Scene, read_transcript
from train.errors import UserError
from train.files import build_directory, read_text, write_atomic

logger = logging.getLogger(__name__)

PLAYS = "plays"
RECIPE = Path("configs/prepare.json")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare. ``show`` "plays" and "planted" are built in; any other show needs a ``transcript``."""

    show: str
    responder: str = PLANTED_RESPONDER
    out: Path = Path("data")
    transcript: Path | None = None
    """A JSON-lines file of ``{"scene", "speaker", "text"}``."""
    queriers: tuple[str, ...] = ()
    """Only these people; empty means everybody with enough data."""
    thresholds: Thresholds | None = None
    """None means the paper's for a transcript, smaller ones for plays."""
    num_clusters: int = 5
    encoder: str | None = None
    """Path of a sentence-transformers model for the clusters; None means TF-IDF."""
    seed: int = 0
    force: bool = False
    """Rebuild a folder that exists."""

    @property
    def folder(self) -> Path:
        """Where the data of this responder goes."""
        return responder_folder(self.out, self.show, self.responder)


def prepare(config: PrepareConfig) -> Path:
    """Build the folder of ``config`` whole or not at all, and return it; one built the same way is reused.

    Raises ``UserError`` for an unknown show, responder or querier, too little data, damaged input, and a
    folder that was built with other settings unless ``force`` is set.
    """
    _check(config)
    folder = config.folder
    if (folder / PAIR_IDS).is_file() and not config.force:
        _require_same_recipe(config)
        logger.info("%s: reused", folder)
        return folder
    data = planted(config.seed, config.num_clusters) if config.show == PLANTED else _from_scenes(config)
    try:
        with build_directory(folder) as workspace:
            write_mqdialog(data, workspace, config.show)
            write_atomic(workspace / RECIPE, json.dumps(_recipe(config), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def _check(config: PrepareConfig) -> None:
    built_in = (PLAYS, PLANTED)
    if config.transcript is None and config.show not in built_in:
        raise UserError(f"show '{config.show}' is unknown, expected {' or '.join(built_in)}, or a transcript")
    if config.transcript is not None and config.show in built_in:
        raise UserError(f"show '{config.show}' is built in, give the transcript another show name")
    if not short_name(config.responder):
        raise UserError(f"responder '{config.responder}' has no letters or digits to name a folder by")
    if config.show == PLANTED and config.responder != PLANTED_RESPONDER:
        raise UserError(f"responder '{config.responder}' is unknown, show 'planted' has {PLANTED_RESPONDER}")


def _require_same_recipe(config: PrepareConfig) -> None:
    """A folder without a recipe was not built here (published data): it is taken as it is."""
    path = config.folder / RECIPE
    if not path.is_file():
        return
    found = json.loads(read_text(path))
    changed = [key for key, value in _recipe(config).items() if found.get(key) != value]
    if changed:
        raise UserError(f"{config.folder} was prepared with other {', '.join(changed)}; --force rebuilds it")


def _recipe(config: PrepareConfig) -> dict:
    """The settings that change what is built, as JSON values."""
    thresholds = _thresholds(config)
    return {
        "transcript": config.transcript and config.transcript.name,
        "queriers": sorted(config.queriers),
        "thresholds": asdict(thresholds),
        "num_clusters": config.num_clusters,
        "encoder": config.encoder and Path(config.encoder).name,
        "seed": config.seed,
    }


def _thresholds(config: PrepareConfig) -> Thresholds:
    return config.thresholds or (PLAY_THRESHOLDS if config.show == PLAYS else Thresholds())


def _scenes(config: PrepareConfig) -> list[Scene]:
    return read_plays() if config.transcript is None else read_transcript(config.transcript)


def _from_scenes(config: PrepareConfig) -> MQDialog:
    splits = split_queriers(
        _scenes(config), config.responder, _thresholds(config), queriers=config.queriers, seed=config.seed
    )
    train = [(querier_id, window) for querier_id, split in enumerate(splits) for window in split.train]
    dev = [(querier_id, window) for querier_id, split in enumerate(splits) for window in split.dev]
    if not dev:
        raise UserError(
            f"responder '{config.responder}': no querier has two dialogues, so dev would be empty"
        )
    clusters = cluster_queries(
        [window.query for _, window in train],
        [window.query for _, window in dev],
        config.num_clusters,
        seed=config.seed,
        encoder=config.encoder,
    )
    queriers = [split.querier for split in splits]
    examples = [
        [
            Example(window.id, window.turns, config.responder, queriers[querier_id], querier_id, cluster_id)
            for (querier_id, window), cluster_id in zip(half, ids, strict=True)
        ]
        for half, ids in zip((train, dev), clusters, strict=True)
    ]
    return MQDialog(config.responder, queriers, 1 + max(clusters[0]), *examples)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m train.data.prepare", description="Build the MQDialog folder of one responder."
    )
    parser.add_argument("--show", help=f"'{PLAYS}', '{PLANTED}', or the name to give a transcript")
    parser.add_argument("--transcript", type=Path, help='JSON lines of {"scene", "speaker", "text"}')
    parser.add_argument("--responder", help=f"who answers (in '{PLANTED}': {PLANTED_RESPONDER})")
    parser.add_argument("--querier", action="append", default=[], help="only this person; may be repeated")
    parser.add_argument("--out", type=Path, default=Path("data"), help="root folder (default: %(default)s)")
    parser.add_argument("--min-turns", type=int, help="turns a querier must speak in the whole transcript")
    parser.add_argument("--min-dialogues", type=int, help="dialogues a querier must have with the responder")
    parser.add_argument("--clusters", type=int, default=5, help="clusters of queries (default: %(default)s)")
    parser.add_argument("--encoder", help="path of a sentence-transformers model for the clusters")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--force", action="store_true", help="rebuild a folder that exists")
    return parser.parse_args()


def _config(arguments: argparse.Namespace) -> PrepareConfig:
    transcript = arguments.transcript
    show = arguments.show or (transcript.stem if transcript else PLAYS)
    if arguments.responder is None and show != PLANTED:
        raise UserError(f"--responder is missing: whose replies of show '{show}'?")
    config = PrepareConfig(
        show=show,
        responder=arguments.responder or PLANTED_RESPONDER,
        out=arguments.out,
        transcript=transcript,
        queriers=tuple(arguments.querier),
        num_clusters=arguments.clusters,
        encoder=arguments.encoder,
        seed=arguments.seed,
        force=arguments.force,
    )
    given = {"min_turns": arguments.min_turns, "min_dialogues": arguments.min_dialogues}
    changed = {key: value for key, value in given.items() if value is not None}
    return replace(config, thresholds=replace(_thresholds(config), **changed))


def main() -> None:
    """Prepare the folder that the command line asks for and show what is in it."""
    folder = prepare(_config(_arguments()))
    console = Console()
    console.print(summary_table(load_mqdialog(folder)))
    console.print(str(folder), soft_wrap=True)


if __name__ == "__main__":
    run(main)
