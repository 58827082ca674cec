"""Published networks as candidates, for measurements that can be compared with figures of other people.

Howard et al. 2019, Searching for MobileNetV3 (arXiv 1905.02244), Tables 1 and 2, 224 px. The spaces of the same names
contain them.
"""

from __future__ import annotations

from nas.core.records import Activation, BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig

_RELU: Activation = "relu"
_SWISH: Activation = "hard_swish"
_Row = tuple[int, int, int, bool, Activation, int]  # kernel, expanded, out, squeeze-and-excitation, activation, stride

_LARGE: tuple[tuple[_Row, ...], ...] = (
    ((3, 16, 16, False, _RELU, 1),),
    ((3, 64, 24, False, _RELU, 2), (3, 72, 24, False, _RELU, 1)),
    ((5, 72, 40, True, _RELU, 2), (5, 120, 40, True, _RELU, 1), (5, 120, 40, True, _RELU, 1)),
    (
        (3, 240, 80, False, _SWISH, 2),
        (3, 200, 80, False, _SWISH, 1),
        (3, 184, 80, False, _SWISH, 1),
        (3, 184, 80, False, _SWISH, 1),
    ),
    ((3, 480, 112, True, _SWISH, 1), (3, 672, 112, True, _SWISH, 1)),
    ((5, 672, 160, True, _SWISH, 2), (5, 960, 160, True, _SWISH, 1), (5, 960, 160, True, _SWISH, 1)),
)
_SMALL: tuple[tuple[_Row, ...], ...] = (
    ((3, 16, 16, True, _RELU, 2),),
    ((3, 72, 24, False, _RELU, 2), (3, 88, 24, False, _RELU, 1)),
    ((5, 96, 40, True, _SWISH, 2), (5, 240, 40, True, _SWISH, 1), (5, 240, 40, True, _SWISH, 1)),
    ((5, 120, 48, True, _SWISH, 1), (5, 144, 48, True, _SWISH, 1)),
    ((5, 288, 96, True, _SWISH, 2), (5, 576, 96, True, _SWISH, 1), (5, 576, 96, True, _SWISH, 1)),
)
_NETWORKS: dict[str, tuple[tuple[tuple[_Row, ...], ...], HeadConfig]] = {
    "mobilenetv3-small-224": (_SMALL, HeadConfig(576, 1024)),
    "mobilenetv3-large-224": (_LARGE, HeadConfig(960, 1280)),
}
PUBLISHED = tuple(_NETWORKS)


def published_network(name: str) -> Candidate:
    """The published network with this name, in fp32, for the 1000 classes of ImageNet; one of `PUBLISHED`."""
    table, head = _NETWORKS[name]
    channels, stages = 16, []
    for rows in table:
        blocks = []
        for kernel, wide, out, se, activation, stride in rows:
            blocks.append(BlockConfig(channels, wide, out, kernel, stride, se, activation))
            channels = out
        stages.append(StageConfig(tuple(blocks)))
    return Candidate(224, 1000, StemConfig(16), tuple(stages), head)
