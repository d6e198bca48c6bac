"""The command line of the suites: ``python -m benchmarks SUITE``.

kernels      the MLP: providers over T x Q x R x model shapes; experts alone; 1 to 10,000 owned
layers       decoder layer, prefill, decoding, training step
generation   many queriers in one batch against one after the other
all          these three, most important first, until the time is up

After that:

python -m benchmarks.report FILE...      tables and figures into docs/results, README's part
python -m benchmarks.compare A B         what became slower between two result files
python -m benchmarks.dispatch_cells FILE the kernels' dispatch table from a card's results
python -m benchmarks.tune                other block sizes of the kernels, on a card
python -m benchmarks.owned               bytes and time of a training step for experts that are absent
python -m benchmarks.finetune_speed      fine-tuning against a straightforward implementation
python -m benchmarks.scale               memory, bandwidth and cost for up to a million queriers
python -m benchmarks.contrast            the querier-contrastive loss against a straightforward one
"""

from __future__ import annotations

import argparse
import logging
import sys
from itertools import chain, count
from pathlib import Path

import torch
import transformers

from benchmarks import generation, kernels, layers
from benchmarks.machine import describe, versions
from benchmarks.schema import load
from benchmarks.session import Session
from benchmarks.tables import summary
from train.cli import run
from train.errors import UserError
from train.files import check_file

SUITES = {"kernels": kernels, "layers": layers, "generation": generation}
_HERE = Path(__file__).parent


def _arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("suite", choices=[*SUITES, "all"])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--quick", action="store_true", help="tiny shapes, to see that everything works")
    parser.add_argument("--minutes", type=float, default=60.0, help="begin nothing after that (default 60)")
    parser.add_argument("--out", type=Path, help="result file (default benchmarks/results/MACHINE-DATE.json)")
    parser.add_argument("--resume", action="store_true", help="keep the rows the result file has already")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    """Run suites; every provider is checked before it is timed."""
    args = _arguments(argv)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("no CUDA device on this machine: nothing was measured")
    transformers.utils.logging.set_verbosity_error()
    logging.getLogger("torch").setLevel(logging.ERROR)
    out = args.out or _default_out(args)
    check_file(out)
    session = Session(args.device, out, args.minutes, _resumed(out, args) if args.resume else None)
    if args.device == "cuda" and not args.quick:
        from benchmarks.calibrate import calibrate

        session.calibrate(calibrate)
    chosen = SUITES.values() if args.suite == "all" else [SUITES[args.suite]]
    left = session.run(chain.from_iterable(suite.jobs(args.device, args.quick) for suite in chosen))
    sys.stdout.write("\n" + summary(session.result) + "\n")
    if left:
        sys.stdout.write(f"no time for the {len(left)} last cells; --resume measures them\n")
    sys.stdout.write(f"{out}\n")


def _default_out(args: argparse.Namespace) -> Path:
    """Today's file, or the one that this machine's last run left where that is resumed.

    Other people's results of the same processor or card lie in the same folder under the same name.
    """
    machine = describe(args.device)
    folder = Path("runs/benchmarks") if args.quick else _HERE / "results"
    today = folder / f"{machine['name']}-{machine['date']}"
    if not args.resume:
        return today.with_suffix(".json")
    written = sorted(folder.glob(f"{machine['name']}-????-??-??*.json"), reverse=True)
    names = chain([today.name], (f"{today.name}-{number}" for number in count(2)))
    unused = next(path for path in (folder / f"{name}.json" for name in names) if not path.exists())
    return next((path for path in written if _is_from_here(load(path), args.device)), unused)


def _resumed(out: Path, args: argparse.Namespace) -> dict | None:
    if not out.exists():
        return None
    result = load(out)
    if not _is_from_here(result, args.device):
        raise UserError(f"{out}: measured on another machine or with other versions, cannot be resumed")
    return result


def _is_from_here(result: dict, device: str) -> bool:
    changing = "date", "memory_bytes"  # a virtual machine's memory differs a little from start to start
    here = {key: value for key, value in describe(device).items() if key not in changing}
    return here.items() <= result["machine"].items() and result["versions"] == versions()


if __name__ == "__main__":
    run(main)
