"""What every command-line entry point of ``train`` shares."""

import argparse
import errno
import os
import sys
import warnings
from collections.abc import Callable

import torch
from rich.console import Console
from tqdm.auto import tqdm

from train.errors import UserError

WIDEST = 120  # columns
USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130
DISK_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
REFUSED = (errno.EACCES, errno.EPERM, errno.EROFS, errno.EEXIST, errno.ENOTDIR, errno.EISDIR)


def run(main: Callable[[], None]) -> None:
    """Call ``main``; ``UserError`` and failed writes become one line on stderr and exit code 2.

    Ctrl-C becomes exit code 130.
    """
    # these packages use names that another of them has deprecated; our users cannot change that
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|accelerate|torch)\..*")
    if not torch.accelerator.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # otherwise DeepSpeed, if installed, logs its choice
    try:
        main()
    except UserError as error:
        _fail(str(error))
    except OSError as error:
        if error.errno not in DISK_FULL + REFUSED:
            raise
        _fail(f"{error.filename or 'a file'} cannot be written: {error.strerror}")
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPT_EXIT) from None


def wide_console() -> Console:
    """For tables of scores: never narrower than they are, as a pipe's 80 columns would be."""
    console = Console()
    console.width = max(console.width, WIDEST)
    return console


def positive_int(text: str) -> int:
    """An ``argparse`` type: a whole number of at least 1."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"got {text}, expected a whole number of at least 1")
    return int(text)


def _fail(message: str) -> None:
    """Exit with one line, which names the rank if there are several."""
    for bar in list(tqdm._instances):
        bar.close()  # it would be drawn again behind the message when Python ends
    rank = f" (rank {os.environ['RANK']})" if int(os.environ.get("WORLD_SIZE", 1)) > 1 else ""
    sys.stderr.write(f"error{rank}: {' '.join(message.split())}\n")
    raise SystemExit(USER_ERROR_EXIT) from None
