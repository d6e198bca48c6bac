"""What every command-line entry point of ``train`` shares."""

import sys
import warnings
from collections.abc import Callable

from train.errors import UserError

USER_ERROR_EXIT = 2
INTERRUPT_EXIT = 130


def run(main: Callable[[], None]) -> None:
    """Call ``main``; a ``UserError`` becomes one line on stderr and exit code 2, Ctrl-C exit code 130."""
    # these call what another of them, or torch, renamed; that is not for our users to mend
    warnings.filterwarnings("ignore", category=FutureWarning, module=r"(transformers|accelerate|torch)\..*")
    try:
        main()
    except UserError as error:
        sys.stderr.write(f"error: {' '.join(str(error).split())}\n")
        raise SystemExit(USER_ERROR_EXIT) from None
    except KeyboardInterrupt:
        raise SystemExit(INTERRUPT_EXIT) from None
