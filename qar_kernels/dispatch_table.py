"""What was measured of the two Triton paths. Empty: nothing was measured yet."""

from __future__ import annotations

# Cells {"device", "H", "I", "T", "Q", "R", "dtype", "pass", "fused_over_grouped"}, named as in a result file
# of the benchmarks ("pass" is "fwd" or "fwd+bwd"; "A" only where the base has adapters); the last is a ratio
# of median times, under 1 the fused path wins. The device is torch.cuda.get_device_name's.
MEASUREMENTS: list[dict] = []
