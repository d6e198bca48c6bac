"""Atomic checkpoints, and how damaged ones are detected.

A checkpoint is built under a hidden name, sealed with the checksum of every file, and renamed. A kill or a
full disk leaves the hidden folder, which the next save removes; later damage shows in the checksums.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import tempfile
from pathlib import Path

from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, rotate_checkpoints

from train.errors import UserError
from train.files import system_error, write_atomic

SEAL = "whole.json"
BUILDING = ".building"
logger = logging.getLogger(__name__)


def fresh_building(run: Path) -> Path:
    """An empty folder to build a checkpoint in; what a killed run left there is deleted."""
    shutil.rmtree(run / BUILDING, ignore_errors=True)
    (run / BUILDING).mkdir(parents=True)
    return run / BUILDING


def publish(built: Path, limit: int) -> Path:
    """Seal ``built``, move it into its run, and delete the oldest checkpoints beyond ``limit``."""
    run = built.parent.parent
    seal(built)
    target = run / built.name
    shutil.rmtree(target, ignore_errors=True)  # a damaged one of the same step
    os.replace(built, target)
    shutil.rmtree(run / BUILDING)
    rotate_checkpoints(output_dir=str(run), save_total_limit=limit)
    return target


def seal(checkpoint: Path) -> None:
    """Write the checksums of all files, after the files themselves have reached the disk."""
    sums = {str(path.relative_to(checkpoint)): _checksum(path, sync=True) for path in _files(checkpoint)}
    write_atomic(checkpoint / SEAL, json.dumps(sums, indent=1))


def damage(checkpoint: Path) -> str | None:
    """What is wrong with a checkpoint, in a few words; None if it is intact."""
    try:
        sums = json.loads((checkpoint / SEAL).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return f"it has no readable {SEAL}"
    for name, expected in sums.items():
        path = checkpoint / name
        if not path.is_file():
            return f"{name} is missing"
        if _checksum(path) != expected:
            return f"{name} is damaged"
    return None


def last_checkpoint(run: Path) -> Path | None:
    """The newest intact checkpoint; damaged newer ones are named in the log and passed over."""
    for path in reversed(all_checkpoints(run)):
        problem = damage(path)
        if problem is None:
            return path
        logger.warning("%s is damaged (%s); falling back to the one before", path, problem)
    return None


def all_checkpoints(run: Path) -> list[Path]:
    """Checkpoint folders by step, damaged ones too."""
    found = [path for path in run.glob(f"{PREFIX_CHECKPOINT_DIR}-*") if path.name.split("-")[-1].isdigit()]
    return sorted(found, key=lambda path: int(path.name.split("-")[-1]))


def make_room(run: Path, kept: Path | None) -> None:
    """Delete what is newer than ``kept``: damaged checkpoints, and one that a killed run was building.

    A folder without a seal may be the user's own work, so any such folder is renamed instead; the rotation
    then leaves it alone too.
    """
    shutil.rmtree(run / BUILDING, ignore_errors=True)
    found = all_checkpoints(run)
    for path in found:
        if not (path / SEAL).exists():
            aside = Path(tempfile.mkdtemp(prefix=f"unsealed-{path.name}-", dir=run))
            os.replace(path, aside)
            logger.warning("%s has no %s; it was moved to %s", path, SEAL, aside)
    for path in found[found.index(kept) + 1 if kept else 0 :]:
        shutil.rmtree(path, ignore_errors=True)


def write_failure(run: Path, step: int, error: Exception) -> UserError:
    """The one-line error for a failed save; torch's own message does not say that a disk is full."""
    free = shutil.disk_usage(run).free / 2**20
    shutil.rmtree(run / BUILDING, ignore_errors=True)
    kept = last_checkpoint(run)
    state = f"{kept} is intact, --resume continues it" if kept else "there is none before it"
    return UserError(
        f"{run}: the checkpoint of step {step} cannot be written ({_reason(error)}; {free:,.0f} MiB free); "
        f"{state}"
    )


def _reason(error: Exception) -> str:
    """What the system said, where the error has kept it; torch speaks of its file's positions instead."""
    system = system_error(error)
    if system is not None:
        return system.strerror or str(system)
    text = str(error).partition("\n")[0]
    return "a file could not be written to its end" if text.startswith("[enforce fail") else text


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file() and path.name != SEAL)


def _checksum(path: Path, sync: bool = False) -> str:
    with path.open("rb") as stream:
        if sync:
            os.fsync(stream.fileno())
        return hashlib.file_digest(stream, "sha256").hexdigest()
