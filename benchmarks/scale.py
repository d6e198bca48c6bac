"""A million queriers on paper: the tables of docs/scale.md. ``python -m benchmarks.scale [--write FILE]``.

Nothing here was measured: every number is a formula over a model's shape and datasheet or assumed rates, all
of which are written in the tables' headings or below. R expert rank, H hidden, L layers, Q queriers present.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from benchmarks.embedding import embed
from benchmarks.tables import markdown
from qar_kernels.roofline import CHIPS
from train.cli import run
from train.files import read_text, write_atomic

# the model, Llama-3-8B: key-value heads have HEAD_DIM each
HIDDEN, LAYERS, PARAMETERS, KV_HEADS, HEAD_DIM = 4096, 32, 8_030_261_248, 8, 128
# the node, with one card; rates in bytes a second
GPU_BYTES = 141e9  # H200, datasheet
HOST_BYTES, DISK_BYTES = 2e12, 30e12  # assumed
HOST_RATE = 32e9 / 8 * 16 * 128 / 130  # PCIe 5.0 x16: 32 GT/s on 16 lanes, 128b/130b
DISK_RATE = 7e9  # sequential reading, assumed
CHIP = "H200"
RANK = 64
QUERIERS = (10**3, 10**4, 10**5, 10**6)
PRESENT = (1, 8, 64, 256)
SEQUENCES, CONTEXT = 64, 4096  # what the cache of keys and values is sized for


def expert_parameters(rank: int = RANK) -> int:
    """Parameters of one querier in all layers: ``3 R H L``.

    >>> expert_parameters()
    25165824
    """
    return 3 * rank * HIDDEN * LAYERS


def expert_bytes(rank: int = RANK, width: int = 2) -> int:
    """The same in bytes; ``width`` 2 is bf16.

    >>> expert_bytes()
    50331648
    """
    return width * expert_parameters(rank)


def cache_bytes(sequences: int = SEQUENCES, context: int = CONTEXT) -> int:
    """Keys and values in bf16: ``2 * 2 * L * kv_heads * head_dim`` a token.

    >>> cache_bytes(1, 1)
    131072
    """
    return 4 * LAYERS * KV_HEADS * HEAD_DIM * sequences * context


def gpu_slots(rank: int = RANK) -> int:
    """Experts that fit beside bf16 base weights and the cache.

    >>> gpu_slots()
    1799
    """
    free = GPU_BYTES - 2 * PARAMETERS - cache_bytes()
    return int(free // expert_bytes(rank))


def decode_bytes(present: int, rank: int = RANK) -> int:
    """Weights that one decoding step reads: the base once, each present expert once (cache left out).

    >>> decode_bytes(0)
    16060522496
    """
    return 2 * PARAMETERS + present * expert_bytes(rank)


def training_bytes(weight: int, gradient: int, states: int) -> int:
    """Bytes for one trained querier: of each parameter its weight, gradient and optimizer states.

    >>> training_bytes(2, 2, 4) // 10**6
    201
    """
    return (weight + gradient + states) * expert_parameters()


def tables() -> dict[str, str]:
    """Every table by the name of its place in the document."""
    return {
        "scale-storage": _storage(),
        "scale-ranks": _ranks(),
        "scale-places": _places(),
        "scale-decode": _decode(),
        "scale-training": _training(),
    }


def _storage() -> str:
    body = []
    for queriers in QUERIERS:
        total = queriers * expert_bytes()
        body.append(
            [
                f"{queriers:,}",
                _bytes(total),
                *(
                    f"{min(1.0, size / total):.1%}"
                    for size in (gpu_slots() * expert_bytes(), HOST_BYTES, DISK_BYTES)
                ),
            ]
        )
    host, disk = _bytes(HOST_BYTES), _bytes(DISK_BYTES)
    head = ["queriers", "experts, bf16", "fit in GPU slots", f"in {host} host memory", f"on {disk} disk"]
    return markdown(head, body)


def _ranks() -> str:
    body = [
        [str(rank), _bytes(expert_bytes(rank)), f"{gpu_slots(rank):,}", _bytes(10**6 * expert_bytes(rank))]
        for rank in (8, 16, 64, 128)
    ]
    return markdown(["R", "a querier, bf16", "GPU slots", "a million queriers"], body)


def _places() -> str:
    size = expert_bytes()
    body = [
        ["GPU slot", f"{gpu_slots():,}", "read in place", "-"],
        *(
            [name, f"{int(held // size):,}", f"{size / rate * 1e3:.2f} ms", f"{rate / size:,.0f}"]
            for name, held, rate in (
                ("host memory", HOST_BYTES, HOST_RATE),
                ("disk", DISK_BYTES, DISK_RATE),
            )
        ),
    ]
    return markdown(["place", "queriers it holds", "to bring one into a slot", "queriers a second"], body)


def _decode() -> str:
    rate = CHIPS[CHIP].bandwidth
    base = decode_bytes(0)
    body = [
        [
            str(present),
            _bytes(decode_bytes(present) - base),
            f"{decode_bytes(present) / base - 1:.1%}",
            f"{decode_bytes(present) / rate * 1e3:.2f} ms",
        ]
        for present in PRESENT
    ]
    head = ["Q present", "expert weights read a step", "on top of the base's", f"floor of a step, {CHIP}"]
    return markdown(head, body)


def _training() -> str:
    kinds = (("all bf16", 2, 2, 4), ("bf16, fp32 master and moments", 2, 2, 12), ("all fp32", 4, 4, 8))
    body = []
    for name, *widths in kinds:
        one = training_bytes(*widths)
        free = GPU_BYTES - 2 * PARAMETERS
        body.append([name, str(sum(widths)), _bytes(one), f"{int(free // one):,}"])
    head = ["weights, gradient, AdamW", "bytes a parameter", "a querier", "queriers at once beside the base"]
    return markdown(head, body)


def _bytes(count: float) -> str:
    for unit, size in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= size:
            return f"{count / size:.3g} {unit}"
    return f"{count:.0f} B"


def main(argv: list[str] | None = None) -> None:
    """Print the tables, or write them into a document between their markers."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.scale", description=__doc__)
    parser.add_argument("--write", type=Path, metavar="FILE", help="a document with the tables' markers")
    args = parser.parse_args(argv)
    if args.write is None:
        sys.stdout.write("\n\n".join(tables().values()) + "\n")
        return
    document = read_text(args.write)
    for name, table in tables().items():
        document = embed(document, name, table + "\n")
    write_atomic(args.write, document)


if __name__ == "__main__":
    run(main)
