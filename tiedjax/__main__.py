"""`python -m tiedjax`."""

import sys

from tiedjax.cli import main

sys.exit(main())
