"""`python -m eclipse`, and what the installed command calls."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line; Ctrl-C while that is still being imported ends quietly: nothing has begun."""
    try:
        from .cli import app
    except KeyboardInterrupt:
        sys.exit(130)
    app()


if __name__ == "__main__":
    main()
