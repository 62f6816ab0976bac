"""``python -m tests.soak``: see :mod:`tests.soak.run`, which new processes import, as they cannot this file."""

from __future__ import annotations

import sys

from tests.soak.run import main

if __name__ == "__main__":
    sys.exit(main())
