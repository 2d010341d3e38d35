"""Benchmarks: `python3 bench/<name>.py --help` from the repository's root, with PYTHONPATH=."""
