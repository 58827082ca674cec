"""One command per hot path or claim: `python -m benchmarks` lists them, `python -m benchmarks.NAME` runs one."""

import os

# As the command line does, before numpy is imported: the arrays are small, and a second thread only waits.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
