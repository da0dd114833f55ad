"""``python -m sma_models.cli`` is the ``sma`` command too."""

import sys

from sma_models.cli import main

if __name__ == "__main__":
    sys.exit(main())
