"""`python -m moezoo` is `moezoo`."""

import sys

from moezoo.cli import main

sys.exit(main())
