"""Small candidates and real ONNX Runtime sessions for the tests of this folder."""

import time
from collections import Counter
from collections.abc import Sequence

import numpy as np
import onnx
import onnxruntime as ort

from nas.core.records import (
    KINDS_WITH_EXPANSION,
    KINDS_WITH_SE,
    BlockConfig,
    BlockKind,
    Candidate,
    DeviceProfile,
    ExitConfig,
    HeadConfig,
    Measurement,
    Precision,
    StageConfig,
    StemConfig,
)

MEAN = (0.48, 0.46, 0.40)
STD = (0.22, 0.23, 0.25)


def small_candidate(precision: Precision = "fp32", thresholds: tuple[float | None, ...] = (0.5, 0.5)) -> Candidate:
    """32 px, three stages: expansion 1 with relu, SE with hard-swish, a residual; two exits, one with all layers."""
    stages = (
        StageConfig((BlockConfig(8, 8, 16, 3, 2),)),
        StageConfig(
            (
                BlockConfig(16, 48, 24, 5, 2, use_se=True, activation="hard_swish"),
                BlockConfig(24, 72, 24, 3, 1, use_se=True, activation="hard_swish"),
            )
        ),
        StageConfig((BlockConfig(24, 48, 32, 7, 1, use_se=True, activation="relu"), BlockConfig(32, 64, 32, 3, 1))),
    )
    exits = tuple(ExitConfig(i, 16 * i, t, conv_channels=24 * i) for i, t in enumerate(thresholds))
    return Candidate(32, 5, StemConfig(8), stages, HeadConfig(64, 32), exits).with_precision(precision)


def kind_block(kind: BlockKind, c_in: int, c_out: int, stride: int) -> BlockConfig:
    wide = 2 * c_in if kind in KINDS_WITH_EXPANSION else c_in
    return BlockConfig(c_in, wide, c_out, 3, stride, kind in KINDS_WITH_SE, "hard_swish", kind)


def kind_candidate(kind: BlockKind) -> Candidate:
    """24 px: an inverted residual, then two blocks of the kind on maps of 3 px, the second one keeps the shape."""
    first = StageConfig((BlockConfig(8, 16, 16, 3, 2),))
    second = StageConfig((kind_block(kind, 16, 72, 2), kind_block(kind, 72, 72, 1)))
    return Candidate(24, 5, StemConfig(8), (first, second), HeadConfig())


def random_candidate(rng: np.random.Generator) -> Candidate:
    """Any network the records allow, kept small."""
    channels = first = int(rng.choice([4, 8, 12]))
    stages = []
    for _ in range(int(rng.integers(1, 4))):
        width = int(rng.choice([6, 8, 16]))
        blocks = []
        for b in range(int(rng.integers(1, 3))):
            blocks.append(
                BlockConfig(
                    channels,
                    channels * int(rng.choice([1, 2, 3])),
                    width,
                    int(rng.choice([3, 5, 7])),
                    int(rng.choice([1, 2])) if b == 0 else 1,
                    bool(rng.integers(2)),
                    "hard_swish" if rng.integers(2) else "relu",
                )
            )
            channels = width
        stages.append(StageConfig(tuple(blocks)))
    exits = tuple(
        ExitConfig(s, int(rng.choice([0, 12])), float(rng.uniform(0.2, 0.9)))
        for s in range(len(stages) - 1)
        if rng.integers(2)
    )
    head = HeadConfig(int(rng.choice([0, 20])), int(rng.choice([0, 24])), "hard_swish" if rng.integers(2) else "relu")
    stem = StemConfig(first, int(rng.choice([3, 5])), int(rng.choice([1, 2])))
    resolution = int(rng.choice([17, 24, 32]))
    return Candidate(resolution, int(rng.integers(2, 7)), stem, tuple(stages), head, exits)


def smooth_images(count: int, side: int, seed: int = 0) -> np.ndarray:
    """Smooth random pictures, uint8 [N, H, W, 3]: sums of a few waves, as varied in brightness as photographs."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[0:side, 0:side] / side
    images = np.zeros((count, side, side, 3))
    for _ in range(4):
        frequency, phase = rng.uniform(-3, 3, (count, 2, 3)), rng.uniform(0, 6.3, (count, 1, 1, 3))
        wave = x[None, :, :, None] * frequency[:, None, None, 0] + y[None, :, :, None] * frequency[:, None, None, 1]
        images += rng.uniform(5, 50, (count, 1, 1, 3)) * np.sin(2 * np.pi * wave + phase)
    return np.clip(images + rng.uniform(60, 190, (count, 1, 1, 3)), 0, 255).astype(np.uint8)


def network_input(images: np.ndarray) -> np.ndarray:
    """Raw pixels float32 [B, 3, H, W]."""
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), dtype=np.float32)


def session(model: bytes, optimised_path: str = "") -> ort.InferenceSession:
    """One thread, all optimisations; saves the optimised graph where a path is given."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 4
    if optimised_path:
        options.optimized_model_filepath = optimised_path
    return ort.InferenceSession(model, options, providers=["CPUExecutionProvider"])


def run(model: bytes, images: np.ndarray) -> list[np.ndarray]:
    """Outputs for raw images [B, 3, H, W]; a static batch of one is looped over."""
    live = session(model)
    entry = live.get_inputs()[0]
    if entry.shape[0] == 1:
        rows = [live.run(None, {entry.name: image[None]}) for image in images]
        return [np.concatenate([np.atleast_1d(row[i]) for row in rows]) for i in range(len(rows[0]))]
    return live.run(None, {entry.name: images})


def op_counts(graph: onnx.GraphProto) -> Counter[str]:
    """Operators of a graph and of the branches in it."""
    counts: Counter[str] = Counter()
    for node in all_nodes(graph):
        counts[node.op_type] += 1
    return counts


def all_nodes(graph: onnx.GraphProto) -> list[onnx.NodeProto]:
    """Nodes of a graph and of the branches in it."""
    nodes = []
    for node in graph.node:
        nodes.append(node)
        for attribute in node.attribute:
            if attribute.type == onnx.AttributeProto.GRAPH:
                nodes += all_nodes(attribute.g)
    return nodes


def optimised_counts(model: bytes, folder: object) -> Counter[str]:
    """Operators that ONNX Runtime really runs."""
    path = f"{folder}/optimised.onnx"
    session(model, path)
    return op_counts(onnx.load(path).graph)


def relative_l2(reference: np.ndarray, other: np.ndarray) -> float:
    """|a - b| / |a| over everything."""
    return float(np.linalg.norm(reference - other) / np.linalg.norm(reference))


PROFILE = DeviceProfile(
    name="cpu",
    board="test board",
    runtime="ort",
    runtime_version=ort.__version__,
    power_mode="none",
    clocks_locked=False,
    threads=1,
    driver="none",
    precisions=("fp32", "int8"),
    kind="measured",
)


def time_models(models: Sequence[bytes]) -> list[Measurement]:
    """Short but real measurements: three rounds of five runs."""
    results = []
    for number, model in enumerate(models):
        live = session(model)
        entry = live.get_inputs()[0]
        feeds = {entry.name: np.zeros(entry.shape, np.float16 if "float16" in entry.type else np.float32)}
        rounds = []
        for _ in range(3):
            samples = []
            for _ in range(5):
                start = time.perf_counter()
                live.run(None, feeds)
                samples.append((time.perf_counter() - start) * 1e3)
            rounds.append(tuple(samples))
        best = min(min(r) for r in rounds)
        results.append(
            Measurement(
                f"model {number}", "network", "fp32", best, tuple(rounds), (True,) * 3, "wall", "2026-01-01", number
            )
        )
    return results
