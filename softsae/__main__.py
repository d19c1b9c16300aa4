"""python -m softsae: the command line."""

import sys

from softsae.cli import main

sys.exit(main())
