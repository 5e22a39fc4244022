"""`python -m fga_fast.cli` is `fga-fast`."""

from __future__ import annotations

import sys

from fga_fast.cli.main import main

sys.exit(main())
