"""`python -m vismem` is `vismem`; launchers such as `accelerate launch -m vismem` need it."""

import sys

from vismem.cli import main

if __name__ == "__main__":
    sys.exit(main())
