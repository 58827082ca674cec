"""Hardware-aware neural architecture search: search, look at the front, export."""
