"""Imports point one way: benchmarks -> train -> qar_models -> qar_kernels -> torch."""

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FORBIDDEN = {
    "qar_kernels": {"qar_models", "train", "benchmarks", "transformers", "peft", "accelerate"},
    "qar_models": {"train", "benchmarks", "peft", "accelerate"},
    "train": {"benchmarks"},
}


def imported_packages(path):
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


@pytest.mark.parametrize("package", FORBIDDEN)
def test_imports_point_one_way(package):
    files = list((ROOT / package).rglob("*.py"))
    assert files
    wrong = {
        f"{path.name}: {name}"
        for path in files
        for name in imported_packages(path)
        if name in FORBIDDEN[package]
    }
    assert not wrong
