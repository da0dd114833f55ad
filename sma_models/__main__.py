"""``python -m sma_models`` is the ``sma`` command."""

import sys

from sma_models.cli import main

if __name__ == "__main__":
    sys.exit(main())
