"""The embedded data set: generated photographs of industrial surface defects, ten classes with boxes and difficulty.

Nothing is downloaded and nothing is random twice: image i of a split depends on (seed, split, i) only, through a hash
(SplitMix64: Steele, Lea, Flood 2014, "Fast splittable pseudorandom number generators"), because NumPy promises no
stable random streams between versions (NEP 19). A scene is drawn first, in units of the image side; the resolution
comes afterwards, so 32, 48 and 64 px show the same scene: textures are fields on a 32 x 32 grid that every resolution
averages over its own pixels, shapes and blur scale with the side. Only the sensor noise belongs to the pixels: it is
drawn per pixel and equally strong at every resolution, as in a camera.

Difficulty d (0 easy, 0.75 hard) lowers the contrast of the defect and raises texture, blur and noise together. Beyond
0.75 labels become unreadable, which lowers the ceiling of every network and separates none, hence the cap.

Classes next to each other differ by one thing: scratch (smooth path) and crack (jagged path); dent (dark above, bright
below) and bump (the opposite), so a vertical flip changes the class; dust (bright dots) and pits (dark dots); stain
(smooth inside) and corrosion (speckled); hole is one large dark disc.

Lines and dots are sums of Gaussians, exp(-x^2) exp(-y^2), so a whole mask is one small matrix product.

The constants below were chosen so that a ResNet of 26 M MACs, trained for 14 epochs on 4,000 images of 32 px, reaches
96.3 % on 3,000 others: 98 % where d < 0.3, 89 % where d > 0.6 (one seed). That leaves room for a front of students.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, fields
from functools import cache
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from scipy.special import betaincinv, ndtri

from nas.core.errors import ConfigError
from nas.data.records import Split, check_resolution

Array = NDArray[Any]
Hashes = NDArray[np.uint64]
SplitName = Literal["train", "val", "test"]
Float = type[np.float32] | type[np.float64]

CLASS_NAMES = ("ok", "scratch", "crack", "dent", "bump", "stain", "corrosion", "hole", "dust", "pits")
MAX_DIFFICULTY = 0.75

GENERATOR_VERSION = 1
"""Counts changes of the pictures; part of the data set's identity, so caches made from older pictures are not used."""

SAMPLE_SHA256 = "7449c50566b67808971ea5fe8fde47f07cff0a87ccd33252a6364d8f25514b5a"
"""What `sample_sha256` returned where this version was written; a test holds every machine to it."""

_SPLIT_IDS: dict[str, int] = {"train": 1, "val": 2, "test": 3}
_GRID = 32  # nodes of a texture field along each axis
_PX = 1 / 32  # one pixel of the 32 px image, the unit in which the recipe below is written
_CHUNK_PIXELS = 48 * 1024  # images rendered at once: few enough for the second-level cache
_BOX_LEVEL = 0.3  # of the mask's peak

# Streams of one image: independent sequences of random numbers.
_SCENE, _PATH, _TEXTURE, _EDGE, _SPECKLE, _SENSOR = range(1, 7)

_BLOTCHES, _BRUSHED, _RIDGES, _GRAIN = range(4)

_GAMMA = np.uint64(0x9E3779B97F4A7C15)  # 2^64 / golden ratio: the increment of SplitMix64


def _mix(values: Hashes) -> Hashes:
    """The output function of SplitMix64 (Stafford's variant 13): every output bit depends on every input bit."""
    values = values ^ (values >> np.uint64(30))
    values *= np.uint64(0xBF58476D1CE4E5B9)
    values ^= values >> np.uint64(27)
    values *= np.uint64(0x94D049BB133111EB)
    values ^= values >> np.uint64(31)
    return values


def _image_keys(seed: int, split: str, indices: NDArray[np.int64]) -> Hashes:
    start = np.array([seed], dtype=np.uint64) * _GAMMA + np.uint64(_SPLIT_IDS[split])
    return _mix(_mix(_mix(start) * _GAMMA) + indices.astype(np.uint64) * _GAMMA)


def _hashes(keys: Hashes, stream: int, count: int) -> Hashes:
    """`count` random 64-bit numbers per image [N, count]."""
    start = _mix(keys + np.uint64(stream) * _mix(np.array([stream], dtype=np.uint64) + _GAMMA))
    return _mix(start[:, None] + np.arange(1, count + 1, dtype=np.uint64) * _GAMMA)


def _uniforms(keys: Hashes, stream: int, count: int) -> NDArray[np.float64]:
    """Uniform numbers in [0, 1) per image [N, count]."""
    return (_hashes(keys, stream, count) >> np.uint64(11)).astype(np.float64) * 2.0**-53


@cache
def _normal_table(dtype: Float) -> Array:
    """Normal quantiles of the 65,536 values of 16 random bits; the largest is 4.3 standard deviations."""
    return ndtri((np.arange(65536) + 0.5) / 65536).astype(dtype)


def _normals(keys: Hashes, stream: int, shape: tuple[int, ...], dtype: Float) -> Array:
    """Standard normal numbers per image [N, *shape], four from each hash."""
    count = int(np.prod(shape))
    words = _hashes(keys, stream, -(-count // 4)).astype("<u8", copy=False).view("<u2")
    return _normal_table(dtype)[words[:, :count]].reshape(len(keys), *shape)


@dataclass(frozen=True, slots=True, eq=False)
class Scene:
    """What is drawn before the resolution is known: arrays over N images, lengths as shares of the side.

    `path` [N, 64] holds further uniform numbers of the shape: steps of a crack, places and sizes of dots.
    """

    keys: Hashes
    label: NDArray[np.int64]
    difficulty: Array
    texture: NDArray[np.int64]
    texture_amplitude: Array
    brightness: Array
    shade_x: Array
    shade_y: Array
    tint: Array  # [N, 3]
    wave_angle: Array
    wave_number: Array
    wave_phase: Array
    brushed_upright: NDArray[np.bool_]
    center_x: Array
    center_y: Array
    contrast: Array
    size: Array  # uniform 0-1, turned into a length by the shape
    angle: Array
    bend: Array
    width: Array
    aspect: Array
    light: Array
    polarity: Array  # uniform 0-1, compared with the share of dark ones by the shape
    color: Array  # [N, 3]
    amount: Array
    path: Array
    blur: Array
    exposure: Array
    noise: Array

    def take(self, indices: Array) -> Scene:
        """The scenes at `indices`."""
        return Scene(**{field.name: getattr(self, field.name)[indices] for field in fields(self)})

    def cast(self, dtype: Float) -> Scene:
        """The same with lengths and factors in `dtype`, so that rendering works in it."""
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return Scene(**{name: v.astype(dtype) if v.dtype.kind == "f" else v for name, v in values.items()})


def draw_scenes(split: SplitName, indices: NDArray[np.int64], seed: int = 0) -> Scene:
    """The scenes of images `indices` [N] of a split: a pure function of (seed, split, index).

    Args:
        split: "train", "val" or "test"; they share no image.
        indices: which images, from 0.
        seed: another seed is another data set of the same kind.
    """
    keys = _image_keys(seed, split, indices)
    draws = iter(_uniforms(keys, _SCENE, 32).T)

    def uniform(low: float, high: float) -> Array:
        return low + (high - low) * next(draws)

    label = (next(draws) * len(CLASS_NAMES)).astype(np.int64)
    difficulty = MAX_DIFFICULTY * betaincinv(1.2, 1.3, next(draws))
    return Scene(
        keys=keys,
        label=label,
        difficulty=difficulty,
        texture=(next(draws) * 4).astype(np.int64),
        texture_amplitude=(0.02 + 0.06 * difficulty) * uniform(0.5, 1.3),
        brightness=uniform(0.35, 0.65),
        shade_x=uniform(-0.15, 0.15),
        shade_y=uniform(-0.15, 0.15),
        tint=np.stack([uniform(-0.06, 0.06) for _ in range(3)], axis=1),
        wave_angle=uniform(0, np.pi),
        wave_number=uniform(0.5, 1.2) / _PX,
        wave_phase=uniform(0, 2 * np.pi),
        brushed_upright=next(draws) < 0.5,
        center_x=uniform(0.28, 0.72),
        center_y=uniform(0.28, 0.72),
        contrast=(0.42 - 0.28 * difficulty) * uniform(0.8, 1.2),
        size=uniform(0, 1),
        angle=uniform(0, np.pi),
        bend=uniform(-0.07, 0.07),
        width=uniform(0.5, 1.0) * _PX,
        aspect=uniform(0.7, 1.4),
        light=np.radians(uniform(-23, 23)),
        polarity=uniform(0, 1),
        color=np.stack([uniform(-1, 1) for _ in range(3)], axis=1),
        amount=next(draws),
        path=_uniforms(keys, _PATH, 64),
        blur=difficulty * uniform(0, 0.95) * _PX,
        exposure=uniform(0.75, 1.25),
        noise=0.008 + 0.045 * difficulty,
    )


@cache
def _averaging(side: int) -> Array:
    """Matrix [side, 32] from the nodes of a field, linear in between, to its mean over each pixel."""
    samples = 16
    place = (np.arange(side * samples) + 0.5) / (side * samples) * _GRID - 0.5
    place = np.clip(place, 0, _GRID - 1)
    left = np.minimum(place.astype(np.int64), _GRID - 2)
    weights = np.zeros((side * samples, _GRID))
    weights[np.arange(len(place)), left] = left + 1 - place
    weights[np.arange(len(place)), left + 1] = place - left
    return weights.reshape(side, samples, _GRID).mean(axis=1)


@cache
def _smoothing(side: int, sigma: float, dtype: Float) -> Array:
    """Matrix [side, 32] that turns white noise on the nodes into a field of unit variance, `sigma` nodes wide."""

    def unscaled(pixels: int) -> Array:
        nodes = np.arange(_GRID)
        kernel = np.eye(_GRID)
        if sigma > 0:
            distance = nodes[:, None] - np.arange(-_GRID, 2 * _GRID)
            gauss = np.exp(-0.5 * (distance / sigma) ** 2).reshape(_GRID, 3, _GRID)
            kernel = gauss[:, 1] + gauss[:, 0, ::-1] + gauss[:, 2, ::-1]  # reflected at both ends
            kernel /= np.linalg.norm(kernel, axis=1, keepdims=True)
        return _averaging(pixels) @ kernel

    scale = np.sqrt(
        np.mean(np.sum(unscaled(_GRID) ** 2, axis=1))
    )  # unit variance at 32 px, and the same scene elsewhere
    return np.ascontiguousarray(unscaled(side) / scale, dtype=dtype)


def _field(scene: Scene, stream: int, side: int, sigma: float, dtype: Float) -> Array:
    """Smooth random field of unit variance [N, side, side]."""
    matrix = _smoothing(side, sigma, dtype)
    return matrix @ _normals(scene.keys, stream, (_GRID, _GRID), dtype) @ matrix.T


_TEXTURE_SIGMAS = (0.0, 0.6, 1.2, 4.0, 5.0)


def _background(scene: Scene, side: int, dtype: Float) -> Array:
    """Grey surface without a defect [N, side, side]."""
    matrices = np.stack([_smoothing(side, sigma, dtype) for sigma in _TEXTURE_SIGMAS])
    across = np.array([3, 0, 1, 2])[
        scene.texture
    ]  # index into _TEXTURE_SIGMAS: blotches 4, brushed 0, ridges .6, grain 1.2
    along = np.array([3, 4, 1, 2])[scene.texture]  # brushed metal is smooth along one axis only
    upright = scene.brushed_upright
    rows, columns = np.where(upright, along, across), np.where(upright, across, along)
    noise = _normals(scene.keys, _TEXTURE, (_GRID, _GRID), dtype)
    texture = matrices[rows] @ noise @ matrices[columns].transpose(0, 2, 1)

    ridged = np.flatnonzero(scene.texture == _RIDGES)
    if len(ridged):
        wave_x = (scene.wave_number * np.cos(scene.wave_angle))[ridged, None, None]
        wave_y = (scene.wave_number * np.sin(scene.wave_angle))[ridged, None, None]
        x, y = _axes(side, dtype)
        wave = np.sin(wave_x * x + wave_y * y + scene.wave_phase[ridged, None, None])
        wave *= np.sinc(wave_x / (2 * np.pi * side)) * np.sinc(wave_y / (2 * np.pi * side))  # mean over a pixel
        texture[ridged] = 0.5 * texture[ridged] + 1.2 * wave

    x, y = (2 * axis - 1 for axis in _axes(side, dtype))
    shade = scene.shade_x[:, None, None] * x + scene.shade_y[:, None, None] * y
    return scene.brightness[:, None, None] + shade + scene.texture_amplitude[:, None, None] * texture


def _axes(side: int, dtype: Float) -> tuple[Array, Array]:
    """Pixel centres as x [1, 1, side] and y [1, side, 1], from 0 to 1."""
    centers = ((np.arange(side) + 0.5) / side).astype(dtype)
    return centers[None, None, :], centers[None, :, None]


def _spots(x: Array, y: Array, sigma: Array, weight: Array, side: int) -> Array:
    """Sum of round Gaussian spots [N, side, side], averaged over each pixel.

    Args:
        x: centres [N, P] as shares of the side; `y`, `sigma` and the peak `weight` likewise.
    """
    dtype = x.dtype.type
    centers = _axes(side, dtype)[0]
    wide = np.sqrt(sigma**2 + dtype(1 / (12 * side**2)))  # a pixel adds the variance of its own width
    peak = weight * (sigma / wide) ** 2
    scale = (dtype(np.sqrt(0.5)) / wide)[:, :, None]
    columns = np.exp(-(((centers - x[:, :, None]) * scale) ** 2))
    rows = np.exp(-(((centers - y[:, :, None]) * scale) ** 2)) * peak[:, :, None]
    return rows.transpose(0, 2, 1) @ columns


def _line(x: Array, y: Array, width: Array, step: Array, side: int) -> Array:
    """Line through close points [N, P]: a Gaussian profile of standard deviation `width` [N] and height 1."""
    weight = step / (width * width.dtype.type(np.sqrt(2 * np.pi)))
    sigma = np.broadcast_to(width[:, None], x.shape)
    return np.minimum(_spots(x, y, sigma, np.broadcast_to(weight[:, None], x.shape), side), 1)


def _signed(scene: Scene, dark_share: float, mask: Array) -> tuple[Array, Array]:
    """Mask and paint of a defect that is darker than the surface in `dark_share` of the images, else brighter."""
    sign = np.where(scene.polarity < dark_share, -1, 1).astype(mask.dtype)
    return mask, (sign[:, None, None] * mask)[:, None]


def _paint_ok(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    nothing = np.zeros((len(scene.keys), side, side), dtype=dtype)
    return nothing, nothing[:, None]


def _paint_scratch(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    points = 64
    half = (0.22 + 0.26 * scene.size)[:, None]
    along = np.linspace(-1, 1, points, dtype=dtype)[None, :]
    bow = scene.bend[:, None] * (along**2 - dtype(1 / 3))
    cos, sin = np.cos(scene.angle)[:, None], np.sin(scene.angle)[:, None]
    x = scene.center_x[:, None] + half * along * cos - bow * sin
    y = scene.center_y[:, None] + half * along * sin + bow * cos
    step = 2 * half[:, 0] / (points - 1)
    return _signed(scene, 0.4, _line(x, y, scene.width, step, side))


def _paint_crack(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    segments, parts = 15, 6
    step = ((1.8 + 1.1 * scene.size) * _PX)[:, None]
    draw = scene.path[:, :segments] * dtype(2) - dtype(1)
    heading = scene.angle[:, None] + np.sign(draw) * dtype(0.45) + draw * dtype(0.95)  # no step goes straight on
    share = ((np.arange(parts) + 0.5) / parts).astype(dtype)

    def walk(turn: Array) -> Array:
        move = step * turn
        nodes = np.cumsum(move, axis=1) - move
        nodes -= (nodes[:, :1] + nodes[:, -1:] + move[:, -1:]) / 2  # the centre lies between both ends
        return (nodes[:, :, None] + move[:, :, None] * share).reshape(len(nodes), segments * parts)

    x = scene.center_x[:, None] + walk(np.cos(heading))
    y = scene.center_y[:, None] + walk(np.sin(heading))
    return _signed(scene, 0.88, _line(x, y, dtype(0.8) * scene.width, step[:, 0] / parts, side))


def _ellipse(scene: Scene, radius: Array, edge: float, side: int, dtype: Float) -> tuple[Array, Array, Array, Array]:
    """Mask with a soft edge; per pixel the distance from the centre (1 on the edge) and its x and y parts."""
    x, y = _axes(side, dtype)
    root = np.sqrt(scene.aspect)
    dx = (x - scene.center_x[:, None, None]) / (radius * root)[:, None, None]
    dy = (y - scene.center_y[:, None, None]) / (radius / root)[:, None, None]
    distance = np.sqrt(dx * dx + dy * dy)
    soft = float(np.hypot(edge * _PX, 0.4 / side))  # no edge is sharper than a pixel
    return _step((1 - distance) * (radius / dtype(soft))[:, None, None]), distance, dx, dy


def _step(value: Array) -> Array:
    """Logistic step from 0 to 1, through tanh because it cannot overflow."""
    half = value.dtype.type(0.5)
    return half + half * np.tanh(half * value)


def _paint_dent(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask, _, dx, dy = _ellipse(scene, 0.11 + 0.13 * scene.size, 0.5, side, dtype)
    slope = dx * np.sin(scene.light)[:, None, None] + dy * np.cos(scene.light)[:, None, None]
    return mask, (dtype(1.3) * slope * mask)[:, None]  # y points down: light from above leaves the upper wall dark


def _paint_bump(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask, paint = _paint_dent(scene, side, dtype)
    return mask, -paint


def _paint_hole(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    radius = 0.07 + 0.10 * scene.size
    mask, distance, _, _ = _ellipse(scene, radius, 0.2, side, dtype)
    away = (distance - 1) * (radius / dtype(_PX))[:, None, None] - dtype(0.8)  # pixels outside the middle of the rim
    rim = np.exp(-(away**2)) * dtype(0.5)
    return mask, (rim - dtype(1.25) * mask)[:, None]


def _blob(scene: Scene, edge: float, side: int, dtype: Float) -> Array:
    """Irregular blob: an ellipse whose border is moved by a smooth random field."""
    radius = (0.13 + 0.15 * scene.size)[:, None, None]
    x, y = _axes(side, dtype)
    root = np.sqrt(scene.aspect)[:, None, None]
    distance = np.hypot((x - scene.center_x[:, None, None]) / root, (y - scene.center_y[:, None, None]) * root)
    level = radius * (1 + dtype(0.3) * _field(scene, _EDGE, side, 2.5, dtype)) - distance
    return _step(level / dtype(edge * _PX))


def _paint_stain(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask = _blob(scene, 0.8, side, dtype)
    strongest = np.abs(scene.color).max(axis=1, keepdims=True)
    return mask, mask[:, None] * (scene.color / np.maximum(strongest, dtype(0.01)))[:, :, None, None]


_BROWN = (-0.15, -0.65, -1.0)  # red loses least
_SPECKLE_COLOR = (1.0, 0.75, 0.5)


def _paint_corrosion(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask = _blob(scene, 0.4, side, dtype)
    speckle = dtype(0.55) * _field(scene, _SPECKLE, side, 0.7, dtype)[:, None]
    brown = np.array(_BROWN, dtype=dtype)[None, :, None, None] * dtype(0.75)
    return mask, mask[:, None] * (brown + speckle * np.array(_SPECKLE_COLOR, dtype=dtype)[None, :, None, None])


def _dots(scene: Scene, radius_px: tuple[float, float], side: int, dtype: Float) -> Array:
    """4 to 11 dots within 0.22 of the centre."""
    most = 11
    place = (scene.path[:, : 3 * most] * dtype(1)).reshape(-1, 3, most)
    x = scene.center_x[:, None] + (place[:, 0] - dtype(0.5)) * dtype(0.44)
    y = scene.center_y[:, None] + (place[:, 1] - dtype(0.5)) * dtype(0.44)
    low, high = radius_px
    radius = (dtype(low) + dtype(high - low) * place[:, 2]) * dtype(_PX)
    count = 4 + np.floor(scene.amount * 8)
    weight = np.where(np.arange(most) < count[:, None], dtype(1.3), dtype(0))  # clipped below: a flat top
    return np.minimum(_spots(x, y, radius * dtype(0.75), weight, side), 1)


def _paint_dust(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask = _dots(scene, (0.6, 1.2), side, dtype)
    return mask, mask[:, None]


def _paint_pits(scene: Scene, side: int, dtype: Float) -> tuple[Array, Array]:
    mask = _dots(scene, (0.6, 1.5), side, dtype)
    return mask, -mask[:, None]


_Painter = Callable[[Scene, int, Float], tuple[Array, Array]]
_PAINTERS: tuple[_Painter, ...] = (  # in the order of CLASS_NAMES
    _paint_ok,
    _paint_scratch,
    _paint_crack,
    _paint_dent,
    _paint_bump,
    _paint_stain,
    _paint_corrosion,
    _paint_hole,
    _paint_dust,
    _paint_pits,
)


def _boxes(mask: Array) -> NDArray[np.float32]:
    """Bounding boxes [N, 4] of masks [N, H, W] above 0.3 of their peak; zeros where the mask is empty."""
    side = mask.shape[1]
    peak = mask.max(axis=(1, 2), keepdims=True)
    inside = (mask > _BOX_LEVEL * peak) & (peak > 0)
    columns, rows = inside.any(axis=1), inside.any(axis=2)
    left, top = columns.argmax(axis=1), rows.argmax(axis=1)
    right, bottom = side - columns[:, ::-1].argmax(axis=1), side - rows[:, ::-1].argmax(axis=1)
    boxes = np.stack([left, top, right, bottom], axis=1).astype(np.float32)
    return np.where(columns.any(axis=1)[:, None], boxes, np.float32(0))


def _blurring(sigma: Array, side: int) -> Array:
    """Matrices [N, side, side] of a Gaussian blur of `sigma` [N] (share of the side), reflected at the border."""
    dtype = sigma.dtype.type
    pixels = np.arange(side, dtype=dtype)
    others = np.arange(-side, 2 * side, dtype=dtype)
    distance = (pixels[:, None] - others)[None]
    narrow = np.maximum(sigma * side, dtype(0.05))[:, None, None]  # below this the kernel is a single pixel anyway
    kernel = np.exp(dtype(-0.5) * (distance / narrow) ** 2).reshape(-1, side, 3, side)
    kernel = kernel[:, :, 1] + kernel[:, :, 0, ::-1] + kernel[:, :, 2, ::-1]
    return kernel / kernel.sum(axis=2, keepdims=True)


def _render_class(scene: Scene, label: int, side: int, dtype: Float) -> tuple[NDArray[np.uint8], NDArray[np.float32]]:
    """Images uint8 [N, side, side, 3] and boxes [N, 4] of scenes of one class."""
    scene = scene.cast(dtype)
    mask, paint = _PAINTERS[label](scene, side, dtype)
    planes = _background(scene, side, dtype)[:, None] * (1 + scene.tint)[:, :, None, None]
    planes += paint * scene.contrast[:, None, None, None]
    blur = _blurring(scene.blur, side)[:, None]
    planes = blur @ planes @ blur.transpose(0, 1, 3, 2)
    planes *= scene.exposure[:, None, None, None]
    planes += _normals(scene.keys, _SENSOR, (3, side, side), dtype) * scene.noise[:, None, None, None]
    np.clip(planes, 0, 1, out=planes)
    pixels = (planes * 255 + dtype(0.5)).astype(np.uint8)
    return pixels.transpose(0, 2, 3, 1), _boxes(mask)


def render(scene: Scene, resolution: int, dtype: Float = np.float32) -> Split:
    """Photographs of scenes, with labels, boxes in pixels and difficulty.

    Args:
        scene: what `draw_scenes` gave.
        resolution: side in pixels.
        dtype: float32 is fast; float64 gives the same bytes on every machine, for the stored hash.

    Raises:
        ConfigError: a resolution out of range.
    """
    check_resolution(resolution)
    count = len(scene.keys)
    images = np.empty((count, resolution, resolution, 3), dtype=np.uint8)
    boxes = np.empty((count, 4), dtype=np.float32)
    at_once = max(1, _CHUNK_PIXELS // resolution**2)
    for label in range(len(CLASS_NAMES)):  # one class at a time: one kind of shape per chunk
        members = np.flatnonzero(scene.label == label)
        for start in range(0, len(members), at_once):
            part = members[start : start + at_once]
            images[part], boxes[part] = _render_class(scene.take(part), label, resolution, dtype)
    return Split(images, scene.label, None, boxes, scene.difficulty.astype(np.float32))


def generate(split: SplitName, count: int, resolution: int, seed: int = 0) -> Split:
    """The first `count` images of a split at `resolution` px: more images never change earlier ones.

    Raises:
        ConfigError: an unknown split, or a resolution out of range.
    """
    if split not in _SPLIT_IDS:
        raise ConfigError(f"split must be one of {', '.join(_SPLIT_IDS)}, got {split!r}")
    return render(draw_scenes(split, np.arange(count), seed), resolution)


def sample_sha256() -> str:
    """SHA-256 of a small sample at two resolutions, in float64, where machines agree after rounding to 8 bits."""
    digest = hashlib.sha256()
    cases: tuple[tuple[SplitName, int], ...] = (("train", 32), ("test", 48))
    for split, resolution in cases:
        sample = render(draw_scenes(split, np.arange(40)), resolution, np.float64)
        for array in (sample.images, sample.labels.astype("<i8"), np.asarray(sample.boxes, dtype="<f4")):
            digest.update(np.ascontiguousarray(array).tobytes())
    return digest.hexdigest()
