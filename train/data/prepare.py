"""From a show and a responder to a finished MQDialog folder: ``prepare(PrepareConfig) -> Path``.

The command line is :mod:`train.data.build`.
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from train.data.anybody import ANYBODY, turn_around
from train.data.cluster import cluster_queries
from train.data.dialogue import PLAY_THRESHOLDS, Thresholds, count_turns, split_queriers
from train.data.layout import PAIR_IDS, Example, MQDialog, responder_folder
from train.data.mqdialog import write_mqdialog
from train.data.names import plain_name, short_name
from train.data.planted import RESPONDER as PLANTED_RESPONDER
from train.data.planted import SHOW as PLANTED
from train.data.planted import planted
from train.data.plays import read_plays
from train.data.transcript import Scene, read_transcript
from train.errors import UserError
from train.files import build_directory, read_json, read_text, write_atomic

logger = logging.getLogger(__name__)

PLAYS = "plays"
RECIPE = Path("configs/prepare.json")


@dataclass(frozen=True)
class PrepareConfig:
    """What to prepare. ``show`` "plays" and "planted" are built in; any other show needs a ``transcript``."""

    show: str
    responder: str = PLANTED_RESPONDER
    """Who answers; "Anybody" is everybody but the ``queriers``, see :mod:`train.data.anybody`."""
    out: Path = Path("data")
    transcript: Path | None = None
    """A file of JSON lines, Markdown or CSV, see :mod:`train.data.transcript`."""
    columns: tuple[tuple[str, str], ...] = ()
    """Of a CSV file: pairs of scene, speaker or text and the column that holds it."""
    queriers: tuple[str, ...] = ()
    """Only these people; empty means everybody with enough data."""
    thresholds: Thresholds | None = None
    """None means the paper's for a transcript, smaller ones for plays."""
    num_clusters: int = 5
    encoder: str | None = None
    """Of the queries that are clustered, see :mod:`train.data.cluster`; None means TF-IDF."""
    seed: int = 0
    force: bool = False
    """Rebuild a folder that exists."""

    def __post_init__(self) -> None:
        """Write names as the transcript's are read."""
        object.__setattr__(self, "responder", plain_name(self.responder))
        object.__setattr__(self, "queriers", tuple(map(plain_name, self.queriers)))

    @property
    def folder(self) -> Path:
        """Where the data of this responder goes."""
        return responder_folder(self.out, self.show, self.responder)

    @property
    def minimums(self) -> Thresholds:
        """The thresholds that apply."""
        return self.thresholds or (PLAY_THRESHOLDS if self.show == PLAYS else Thresholds())


def read_scenes(config: PrepareConfig) -> list[Scene]:
    """The scenes that ``config`` asks for, of all speakers.

    Raises ``UserError`` for an unknown show, damaged input, and the planted set, which has no transcript.
    """
    _check_show(config)
    if config.show == PLANTED:
        raise UserError(f"show '{PLANTED}' has no transcript: {PLANTED_RESPONDER} answers all its queriers")
    if config.transcript is None:
        return read_plays()
    return read_transcript(config.transcript, dict(config.columns))


def prepare(config: PrepareConfig, scenes: Sequence[Scene] | None = None) -> Path:
    """Build the folder of ``config``, all or nothing, and return it; one built the same way is reused.

    ``scenes`` are those of :func:`read_scenes`, if several responders share them.

    Raises ``UserError`` for an unknown show, responder or querier, too little data, damaged input, and a
    folder that was built with other settings unless ``force`` is set.
    """
    _check(config)
    folder = config.folder
    if (folder / PAIR_IDS).is_file() and not config.force:
        _require_same_recipe(config)
        logger.info("%s: reused", folder)
        return folder
    if not config.force and folder.exists() and (folder.is_file() or any(folder.iterdir())):
        raise UserError(f"{folder}: is there without {PAIR_IDS}; --force puts the data in its place")
    if config.show == PLANTED:
        data = planted(config.seed, config.num_clusters)
    else:
        data = _from_scenes(config, read_scenes(config) if scenes is None else scenes)
    try:
        with build_directory(folder) as workspace:
            write_mqdialog(data, workspace, config.show)
            write_atomic(workspace / RECIPE, json.dumps(_recipe(config), indent=1) + "\n")
    except OSError as error:
        raise UserError(f"{folder}: cannot be written ({error.strerror})") from error
    return folder


def _check_show(config: PrepareConfig) -> None:
    built_in = (PLAYS, PLANTED)
    if config.transcript is None and config.show not in built_in:
        raise UserError(f"show '{config.show}' is unknown, expected {' or '.join(built_in)}, or a transcript")
    if config.transcript is None and config.columns:
        raise UserError("columns are those of a CSV transcript, but no transcript is given")
    if config.transcript is not None and config.show in built_in:
        raise UserError(f"show '{config.show}' is built in, give the transcript another show name")


def _check(config: PrepareConfig) -> None:
    _check_show(config)
    if Path(config.show).name != config.show or config.show in ("", ".."):
        raise UserError(f"show '{config.show}': expected a name for a folder and files, not a path")
    if not 0 <= config.seed < 2**32:  # what scikit-learn takes
        raise UserError(f"seed: got {config.seed}, expected 0 to 4294967295")
    if not short_name(config.responder):
        raise UserError(f"responder '{config.responder}' has no letters or digits to name a folder by")
    if config.show == PLANTED and config.responder != PLANTED_RESPONDER:
        raise UserError(f"responder '{config.responder}' is unknown, show 'planted' has {PLANTED_RESPONDER}")


def _require_same_recipe(config: PrepareConfig) -> None:
    """A folder without a recipe was not built here (published data): it is taken as it is."""
    path = config.folder / RECIPE
    if not path.is_file():
        return
    recipe = _recipe(config)
    found = read_json(path, recipe)
    changed = [key for key, value in recipe.items() if found[key] != value]
    if "responder" in changed:
        raise UserError(
            f"{config.folder} holds the data of '{found['responder']}', which has the same folder name as "
            f"'{config.responder}'; --out takes another root"
        )
    if changed:
        raise UserError(f"{config.folder} was prepared with other {', '.join(changed)}; --force rebuilds it")


def _recipe(config: PrepareConfig) -> dict:
    """The settings that change what is built, as JSON values."""
    return {
        "responder": config.responder,  # whose folder may be another's too: Ann Lee, Annlee
        "transcript": config.transcript and config.transcript.name,
        "text": config.transcript and hashlib.sha256(read_text(config.transcript).encode()).hexdigest(),
        "columns": dict(config.columns) or None,
        "queriers": sorted(config.queriers),
        "thresholds": asdict(config.minimums),
        "num_clusters": config.num_clusters,
        "encoder": config.encoder and Path(config.encoder).name,
        "seed": config.seed,
    }


def _from_scenes(config: PrepareConfig, scenes: Sequence[Scene]) -> MQDialog:
    spoken = count_turns(scenes)  # turned around, some turns are there twice and others not at all
    if config.responder == ANYBODY:
        scenes = turn_around(scenes, config.queriers)
    splits = split_queriers(
        scenes, config.responder, config.minimums, queriers=config.queriers, seed=config.seed, spoken=spoken
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
