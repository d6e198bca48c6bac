"""Settings from YAML and from ``key=value``: keys and types are those of a dataclass's fields."""

from __future__ import annotations

from dataclasses import MISSING, fields
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

import yaml

from train.errors import UserError
from train.files import unknown_key

T = TypeVar("T")
TEXTS = (str, str | None)
"""Types whose overrides are taken literally: YAML would read ``a #2`` as ``a``, and ``2026`` as a number."""
EXPECTED: dict[Any, str] = {
    float: "a number",
    Path: "the path of a file",
    tuple[str, ...]: "a list of names",
    tuple[int, ...]: "a list of whole numbers",
    tuple: "a list of pairs",
    dict: "a mapping",
}


def parse_override(override: str, is_text: bool = False) -> tuple[str, Any]:
    """Key and value of ``key=value``: YAML, but a text is taken literally unless it is quoted or ``null``.

    Raises ``UserError`` naming ``override`` if it is no such pair.
    """
    key, equals, value = override.partition("=")
    if not equals:
        raise UserError(f"override '{override}': expected key=value")
    if is_text and value not in ("", "~", "null") and value[0] not in "\"'":
        return key, value
    try:
        return key, yaml.safe_load(value)
    except yaml.YAMLError as error:
        raise UserError(f"override '{override}': the value is not valid YAML") from error


def config_from(cls: type[T], values: dict[str, Any], origin: str) -> T:
    """A ``cls`` of ``values``, whose keys and types are checked; ``origin`` is named in errors."""
    hints = get_type_hints(cls)
    for key in values:
        if key not in hints:
            raise unknown_key(key, hints, origin)
    for field in fields(cls):
        if field.default is MISSING and field.default_factory is MISSING and field.name not in values:
            raise UserError(f"{origin}: key '{field.name}' is missing")
    checked = {key: convert(value, hints[key], f"{origin}: key '{key}'") for key, value in values.items()}
    try:
        return cls(**checked)
    except UserError as error:
        raise UserError(f"{origin}: {error}") from error


def convert(value: Any, hint: Any, where: str) -> Any:
    """``value`` as the annotated type: exact, but for numbers to float, texts to paths, lists to tuples."""
    options = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
    if value is None and NoneType in options:
        return None
    kind = next(option for option in options if option is not NoneType)
    try:
        return _as(kind, value)
    except (TypeError, ValueError):
        expected = _described(kind) + (" or null" if NoneType in options else "")
        raise UserError(f"{where}: got {value!r}, expected {expected}") from None


def _described(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return f"one of {', '.join(map(str, get_args(kind)))}"
    return EXPECTED.get(kind) or EXPECTED.get(get_origin(kind)) or kind.__name__


def _as(kind: Any, value: Any) -> Any:
    """``value`` as one of ``kind``, which is no union; ``TypeError`` or ``ValueError`` if it cannot be."""
    origin, inner = get_origin(kind) or kind, get_args(kind)
    if origin is float and type(value) in (int, float, str):
        return float(value)  # YAML reads 1e-4 (without a dot) as text
    if origin is Path and type(value) is str:
        return Path(value)
    if origin is tuple and isinstance(value, list | tuple):
        kinds = inner[:1] * len(value) if inner[-1] is ... else inner
        return tuple(_as(*pair) for pair in zip(kinds, value, strict=True))
    if origin is dict and type(value) is dict:
        return {_as(inner[0], key): _as(inner[1], item) for key, item in value.items()}
    if kind is Any or type(value) is kind or (origin is Literal and value in inner):
        return value
    raise TypeError
