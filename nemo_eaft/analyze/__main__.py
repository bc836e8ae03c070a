"""``python -m nemo_eaft.analyze MODEL DATA [key=value ...]``: a rank, or the launcher if started alone."""

import sys

from nemo_eaft import cli

if __name__ == "__main__":
    sys.exit(cli.main(["analyze", *sys.argv[1:]]))
