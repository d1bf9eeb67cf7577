"""`python -m csvfast` is the `csvfast` command."""

from __future__ import annotations

import sys

from csvfast.cli import main

sys.exit(main())
