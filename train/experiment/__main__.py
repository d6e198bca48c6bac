"""Compare methods under one budget.

    python -m train.experiment --config train/configs/experiments/plays.yaml [key=value ...]

Every cell (method, seed and split) keeps its result, so a second run resumes where the first one stopped.
"""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

import transformers

from train.cli import run
from train.experiment.load import load_experiment
from train.experiment.run import run_experiment


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("--config", type=Path, required=True, help="a YAML file of train/configs/experiments")
    parser.add_argument("--results", type=Path, help="folder of the table (default: the output_dir)")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="replace keys of the file")
    arguments = parser.parse_intermixed_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    transformers.logging.disable_progress_bar()
    experiment = load_experiment(arguments.config, arguments.overrides)
    run_experiment(experiment, arguments.results or Path(experiment.output_dir), arguments.config.stem)


if __name__ == "__main__":
    run(main)
