"""`python3 agent.pyz`: the agent; with `--worker` the process that it runs models in."""

import hashlib
import sys
from typing import List

from . import serve, worker


def main(command: List[str], name: str) -> None:
    """Runs what the arguments ask for.

    Args:
        command: starts this program again.
        name: content hash of the agent.
    """
    if "--worker" in sys.argv[1:]:
        worker.main()
    else:
        serve.serve(command, name)


def packed() -> None:
    """Entry of the one file that lies on a board."""
    with open(sys.argv[0], "rb") as f:
        name = hashlib.sha256(f.read()).hexdigest()
    main([sys.executable, "-u", sys.argv[0]], name)


if __name__ == "__main__":
    main([sys.executable, "-u", "-m", str(__package__)], "source")
