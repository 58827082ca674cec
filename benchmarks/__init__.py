"""One command per hot path or claim: `python -m benchmarks` lists them, `python -m benchmarks.NAME` runs one."""
