"""Files and folders that are written atomically, and read with errors that name the place."""

import difflib
import glob
import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from train.errors import UserError


def read_text(path: Path) -> str:
    """The UTF-8 text of ``path``; a missing, undecodable or empty file is a ``UserError`` naming it."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror})") from error
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise UserError(f"{path}:{line}: not UTF-8 text (byte 0x{data[error.start]:02x})") from error
    if not text.strip():
        raise UserError(f"{path}: the file is empty")
    return text


def read_mapping(path: Path) -> dict[str, Any]:
    """The mapping in a YAML file; ``UserError`` naming the file for anything else."""
    try:
        values = yaml.safe_load(read_text(path))
    except yaml.YAMLError as error:
        raise UserError(f"{path}: not valid YAML: {error}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path}: got {type(values).__name__}, expected a mapping of keys to values")
    return values


def load_json(path: Path) -> Any:
    """The value of the JSON in ``path``; ``UserError`` naming file and line if it is damaged."""
    text = read_text(path)
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}:{error.lineno}: damaged JSON ({error.msg})") from error
    except (ValueError, RecursionError) as error:  # a number too long for Python, brackets too deep
        raise UserError(f"{path}: damaged JSON ({error})") from error


def read_json(path: Path, keys: Iterable[str]) -> dict[str, Any]:
    """The JSON object in ``path``, which must have ``keys``; ``UserError`` naming the file otherwise."""
    values = load_json(path)
    missing = [key for key in keys if not isinstance(values, dict) or key not in values]
    if missing:
        raise UserError(f"{path}: damaged, '{missing[0]}' is missing")
    return values


def unknown_key(key: str, known: Iterable[str], origin: str) -> UserError:
    """The error for a key that ``origin`` does not know, with the closest known one."""
    close = difflib.get_close_matches(str(key), known, n=1)
    hint = f"; did you mean '{close[0]}'?" if close else ""
    return UserError(f"{origin}: unknown key '{key}'{hint}")


def write_atomic(path: Path, content: str | bytes) -> None:
    """Write ``content`` to ``path`` through a temporary sibling, so that a reader never sees half a file."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content.encode("utf-8") if isinstance(content, str) else content)


def write_tensors(path: Path, tensors: dict[str, Tensor]) -> None:
    """Like :func:`write_atomic`, for a safetensors file."""
    with _replacing(path) as temporary:
        save_file(tensors, temporary)


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling that takes the place of ``path`` when the block ends without error."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}")
    with _naming(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.touch(exist_ok=False)
    mode = temporary.stat().st_mode & 0o777  # as the umask has it; safetensors makes it 0600
    try:
        with _naming(path):
            yield temporary
        temporary.chmod(mode)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Turn a write that the system refuses within the block into an ``OSError`` that names ``path``.

    "No such file" is a ``UserError``: said of a write, it is a place where no file can be made, such as
    ``/proc``, and no missing input.
    """
    try:
        yield
    except FileNotFoundError as error:
        raise UserError(f"{path}: cannot be written ({error.strerror})") from error
    except SafetensorError as error:
        system = system_error(error)
        if system is None:
            raise
        raise OSError(system.errno, system.strerror, str(path)) from error
    except OSError as error:
        error.filename = str(path)  # not the temporary one beside it
        raise


def system_error(error: BaseException) -> OSError | None:
    """The system's error in or behind ``error``: safetensors gives only its number, torch hides it."""
    if found := re.search(r"os error (\d+)", str(error)):
        return OSError(number := int(found[1]), os.strerror(number))
    return next((one for one in (error, error.__context__) if isinstance(one, OSError)), None)


def check_file(path: Path) -> None:
    """``UserError`` if :func:`write_atomic` cannot put a file there: a folder is, or a file is above it."""
    if path.is_dir():
        raise UserError(f"{path}: is a folder, expected a file to write")
    check_place(path)


def check_place(path: Path) -> None:
    """``UserError`` if nothing can be made at ``path``; for use before the work whose result goes there."""
    nearest = next(parent for parent in path.absolute().parents if os.path.lexists(parent))
    if not nearest.is_dir():  # a file, or a link to nothing
        raise UserError(f"{path}: cannot be written, {nearest} is no folder")
    try:
        tempfile.TemporaryFile(dir=nearest).close()  # permissions alone do not tell: /proc has them all
    except OSError as error:
        raise UserError(f"{path}: cannot be written, {nearest} takes no files ({error.strerror})") from error


@contextmanager
def build_directory(target: Path) -> Iterator[Path]:
    """Yield an empty sibling folder that takes the place of ``target`` when the block ends without error."""
    with _naming(target):
        target.parent.mkdir(parents=True, exist_ok=True)
        workspace = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        built = workspace / "new"
        built.mkdir()
        with _naming(target):
            yield built
        if target.exists():
            os.replace(target, workspace / "old")
        os.replace(built, target)
    finally:
        shutil.rmtree(workspace)


def remove_unfinished(target: Path) -> None:
    """Delete what :func:`build_directory` left beside ``target`` where it was killed."""
    for path in target.parent.glob(f".{glob.escape(target.name)}.{'?' * 8}"):  # as mkdtemp names them
        shutil.rmtree(path, ignore_errors=True)
