"""Command line of the benchmarks."""

import sys

from benchmarks.bench import main

sys.exit(main())
