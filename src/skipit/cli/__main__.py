"""`python -m skipit.cli`, which launchers of several processes need."""

import sys

from .main import main

if __name__ == "__main__":
    sys.exit(main())
