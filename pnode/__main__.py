"""Entry point of ``python -m pnode``."""

import sys

from pnode.cli import main

sys.exit(main())
