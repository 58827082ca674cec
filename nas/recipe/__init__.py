"""Floor 3: candidate -> scored student; finalist -> finished student. Work that runs in worker processes."""
