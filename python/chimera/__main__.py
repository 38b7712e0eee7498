"""`python -m chimera` is `chimera`."""

import sys

from chimera.cli.main import main

sys.exit(main())
