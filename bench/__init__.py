"""Benchmarks: `python3 bench/<name>.py --help` from the repository's root, with PYTHONPATH=."""

import os

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # the profiler's own messages; read when torch is imported
