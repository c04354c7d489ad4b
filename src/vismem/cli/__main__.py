"""`python -m vismem.cli` is `vismem`."""

import sys

from vismem.cli import main

if __name__ == "__main__":
    sys.exit(main())
