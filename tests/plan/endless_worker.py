"""A rehearsal's building process that does not get done."""

import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nemo_eaft.plan.rehearsal import model, worker


def endless(config: Mapping[str, Any], folder: Path) -> None:
    (folder / "config.json").touch()
    time.sleep(600)


if __name__ == "__main__":
    model.write_hf_files = endless
    sys.exit(worker.main(sys.argv[1:]))
