"""What was measured of the two Triton paths. Empty: nothing was measured yet.

Written by ``python -m qar_kernels.tabulate RESULT.json``.
"""

from __future__ import annotations

# Cells {"device", "pass", "dtype", "T", "Q", "R", "H", "I", "fused_over_grouped"}; the last is a ratio of
# median times, under 1 the fused path wins. The device is torch.cuda.get_device_name's.
MEASUREMENTS: list[dict] = []
