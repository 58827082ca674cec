"""Floor 1: torch networks built from records: student, supernet, teachers."""
