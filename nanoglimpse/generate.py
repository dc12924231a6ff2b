"""`python -m nanoglimpse.generate "What does the sign say?" --image street.jpg`."""

import sys

from nanoglimpse.cli.ask import main

if __name__ == "__main__":
    sys.exit(main())
