"""`python -m raev2` is the `raev2` command."""

import sys

from raev2.command.cli import main

sys.exit(main())
