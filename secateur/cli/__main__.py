"""`python -m secateur.cli`."""

from __future__ import annotations

import sys

from secateur.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
