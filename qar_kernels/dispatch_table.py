"""What was measured of the two Triton paths. Empty: nothing was measured yet."""

from __future__ import annotations

# Cells {"device", "H", "I", "T", "Q", "fused_over_grouped"}; the last is a ratio of times, under 1 the
# fused path wins. The device is torch.cuda.get_device_name's.
MEASUREMENTS: list[dict] = []
