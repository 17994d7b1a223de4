"""`python -m secateur.cli`."""

import sys

from secateur.cli.entry import main

if __name__ == "__main__":
    sys.exit(main())
