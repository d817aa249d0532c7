"""Start the coordinator: `python -m nbdurable.coordinator --home FOLDER [--stay]`."""

from __future__ import annotations

import argparse
import json
import logging
import sys
from pathlib import Path

from nbdurable.coordinator.daemon import serve
from nbdurable.errors import DurableError
from nbdurable.settings import Home


def main() -> int:
    """Serve until the end; why it did not start is the last line of its log, for the client to read."""
    parser = argparse.ArgumentParser(
        prog="python -m nbdurable.coordinator", description="The coordinator of a project."
    )
    parser.add_argument("--home", required=True, type=Path, help="the project's .nbdurable folder")
    parser.add_argument("--stay", action="store_true", help="do not end when idle")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
    try:
        serve(Home(options.home.resolve()), stay=options.stay)
    except DurableError as error:
        print(json.dumps(error.to_wire()), file=sys.stderr, flush=True)
        return error.exit_status
    return 0


if __name__ == "__main__":
    sys.exit(main())
