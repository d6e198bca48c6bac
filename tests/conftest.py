"""One thread for every test and what it starts, and Triton's interpreter.

With more threads BLAS cuts a product by its number of rows, and a row's last bits depend on who shares the
batch (seen on a CPU with AVX-512); tests that compare bits would hold on some machines only.
"""

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported, and for child processes
# Triton reads this when a kernel is decorated, whichever test imports it first; ``make test-gpu`` sets 0.
os.environ.setdefault("TRITON_INTERPRET", "1")
