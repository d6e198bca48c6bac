"""The choice between the two Triton paths."""

from qar_kernels.dispatch import default_path, measured_path


def test_dispatch():
    assert default_path(rows=4096, segments=64) == "fused"
    assert default_path(rows=256, segments=256) == "grouped"
    cell = {"device": "card", "H": 4096, "I": 14336, "T": 4096, "Q": 64, "fused_over_grouped": 1.1}
    table = [cell, cell | {"T": 256, "fused_over_grouped": 0.9}]
    assert measured_path(table, "card", 4096, 14336, rows=3000, segments=60) == "grouped"
    assert measured_path(table, "card", 4096, 14336, rows=200, segments=60) == "fused"
    assert measured_path(table, "card", 4096, 14336, rows=1024, segments=60) is None
    assert measured_path(table, "other", 4096, 14336, rows=4096, segments=64) is None
