"""``python -m ciuic_compile``: the same as the command ``ciuic``."""

import sys

from ciuic_compile.cli import main

if __name__ == "__main__":
    sys.exit(main())
