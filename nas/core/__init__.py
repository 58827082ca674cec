"""Floor 0: frozen records, the one walk over a network, errors, strict JSON, files. Standard library only."""
