"""`python -m tests.soak`, which is what `make soak` runs."""

import sys

from tests.soak.soak import main

sys.exit(main(sys.argv[1:]))
