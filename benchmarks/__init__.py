"""Benchmarks: every way is checked against the float64 reference before it is timed."""

import os

# The profiler's own log lines; torch reads both when it is imported.
os.environ.setdefault("KINETO_LOG_LEVEL", "99")
os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
