"""Early-exit thresholds solved exactly: every setting of a network's exits, from its logits and exit latencies.

The logits here are made up: later exits are surer and more often right. Run from the project's folder:
.venv/bin/python examples/solve_thresholds.py
"""

from __future__ import annotations

import numpy as np

from nas.latency.exits import solve_for_loss, sweep

EXITS, IMAGES, CLASSES = 3, 2000, 10
EXIT_MS = (0.4, 0.7, 1.0)  # an image that leaves at the last exit has passed all of them

rng = np.random.default_rng(0)
labels = rng.integers(0, CLASSES, IMAGES)
logits = rng.normal(0, 1.5, (EXITS, IMAGES, CLASSES))
logits[:, np.arange(IMAGES), labels] += np.linspace(3, 6, EXITS)[:, None]

swept = sweep(logits, labels, EXIT_MS)
print(f"{swept.vectors} settings of {EXITS - 1} thresholds on {IMAGES} images; without early exits:")
print(f"  top1 {100 * swept.full_right / IMAGES:.1f} %, {EXIT_MS[-1]:.2f} ms")

for loss in (0.0, 0.005, 0.02):
    best = solve_for_loss(swept, loss)
    thresholds = ", ".join(f"{t:.3f}" for t in best.thresholds)
    shares = " / ".join(f"{100 * share:.0f} %" for share in best.shares)
    print(
        f"losing at most {100 * loss:.1f} points: expected {best.expected_ms:.3f} ms, top1 {100 * best.top1:.1f} %, "
        f"thresholds {thresholds}, images leave {shares}"
    )
