"""What is in a search space: its size, its smallest and largest network, and one network drawn at random.

Run from the project's folder: .venv/bin/python examples/explore_space.py [SPACE]
"""

from __future__ import annotations

import sys

import numpy as np

from nas.core.units import format_bytes, format_count
from nas.core.walk import expand, total_macs, total_params
from nas.search.experiment import space_file
from nas.space.space import load_space

space = load_space(space_file(sys.argv[1] if len(sys.argv) > 1 else "tiny-32", "SPACE"), num_classes=10)
rows = space.layers()
print(f"{space.name}: {len(space.genes)} decisions, {format_count(space.size)} networks, {len(rows)} rows to measure")

for title, genotype in (
    ("smallest", space.smallest()),
    ("largest", space.largest()),
    ("random", space.sample(np.random.default_rng(0))),
):
    candidate = space.decode(genotype)
    size = sum(layer.weight_bytes for layer in expand(candidate))
    print(
        f"{title:<9} {candidate.id}: {format_count(total_macs(candidate))} MACs, "
        f"{format_count(total_params(candidate))} parameters, {format_bytes(size)} of weights, "
        f"{len(candidate.exits)} early exits, {candidate.precision_label}"
    )

# The same candidate, layer by layer: this one walk is what counting, measuring, exporting and reports are made of.
print("\nlayers of the random one:")
for layer in expand(candidate):
    print(f"  {layer.name:<12} segment {layer.segment}  {format_count(layer.macs):>8} MACs  {layer.key}")
