"""`python -m mnemos` is the command `mnemos`."""

import sys

from mnemos.cli.main import main

sys.exit(main())
