"""`nas doctor`: what works here and what does not, each line with its fix. Every check does the thing itself."""

from __future__ import annotations

import importlib
import importlib.metadata
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from shlex import quote
from typing import Any, Literal

import click

from nas.cli.options import common_options
from nas.cli.output import Console
from nas.core.errors import DeviceError, NasError, StorageError, UsageError
from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.core.units import format_bytes, format_ms

Level = Literal["OK", "WARN", "FAIL"]
Area = Literal["environment", "device", "storage"]

EXIT_CODES: dict[Area, int] = {
    "device": DeviceError.exit_code,
    "storage": StorageError.exit_code,
    "environment": UsageError.exit_code,
}

MIN_PYTHON = (3, 11)
GIB = 1 << 30
# The quickstart keeps about 0.3 GiB on disk and stays below 3 GB of memory.
DISK_WARN, DISK_FAIL = 2 * GIB, GIB // 2
GPU_TOLERANCE = 0.1  # of the loss of a short training, against float32 on a processor
MEMORY_WARN, MEMORY_FAIL = 3 * GIB, GIB
REJECTED_WARN = 0.3  # share of disturbed readings above which measuring takes noticeably longer
DRIFT_WARN = 0.10

# Import name where it differs from the name of the package.
IMPORT_NAMES = {"pyyaml": "yaml", "pillow": "PIL"}


@dataclass(frozen=True, slots=True)
class Check:
    """One line: what was looked at, how it is, and what to do when it is not OK."""

    name: str
    level: Level
    text: str
    fix: str = ""
    area: Area = "environment"
    details: dict[str, Any] = field(default_factory=dict)


@click.command(short_help="Check this machine, or a board behind SSH: versions, a real inference, clocks.")
@click.option("--device", metavar="NAME", help="Check this device only, such as ssh:me@jetson.")
@click.option(
    "--bundle",
    metavar="FILE",
    type=click.Path(path_type=Path),
    help="Write what was found into a .zip file to send, without names, tokens and passwords.",
)
@click.option("--set-power-mode", metavar="NAME_OR_ID", help="First set this power mode on the board, by sudo -n.")
@click.option("--lock-clocks", is_flag=True, help="First lock the clocks of the board, by sudo -n jetson_clocks.")
@common_options
@click.pass_obj
def command(
    console: Console, device: str | None, bundle: Path | None, set_power_mode: str | None, lock_clocks: bool
) -> None:
    """Checks this machine by doing the real thing: imports, a training step, an inference on each device, writing.

    With --device it looks at that one only, and says of a board what is wrong and the command that mends it. Nothing
    there is changed unless --set-power-mode or --lock-clocks ask for it.

    Exits with 4 when a device fails, 6 when files cannot be written, 2 when the environment is incomplete, else 0.
    """
    if (set_power_mode is not None or lock_clocks) and not (device or "").startswith("ssh:"):
        raise UsageError("--set-power-mode and --lock-clocks change a board; name it: --device ssh:USER@HOST")
    if bundle is not None:
        from nas.cli.boards import check_bundle, write_bundle

        check_bundle(bundle)
    checks = []
    errors: list[Exception] = []
    for check in (
        run_checks(Path.cwd())
        if device is None
        else _each_device(device, console.warn, errors.append, set_power_mode, lock_clocks)
    ):
        checks.append(check)
        console.say(f"{check.level:<4}  {check.name}: {check.text}")
        if check.fix and check.level != "OK":
            console.say(f"      fix: {check.fix}")
    code = exit_code(checks)
    counts = {level: sum(c.level == level for c in checks) for level in ("OK", "WARN", "FAIL")}
    console.say(", ".join(f"{count} {level}" for level, count in counts.items()))
    if bundle is not None:
        write_bundle(bundle, checks, device, errors[0] if errors else None)
        console.say(f"written: {bundle}; look into it before you send it")
    console.result({"checks": checks, "exit_code": code})
    if code:
        click.get_current_context().exit(code)


def exit_code(checks: list[Check]) -> int:
    """0, or the exit code of the gravest area with a failure."""
    failed = {check.area for check in checks if check.level == "FAIL"}
    return next((code for area, code in EXIT_CODES.items() if area in failed), 0)


def run_checks(folder: Path) -> Iterator[Check]:
    """All checks, each given as soon as it is done.

    Args:
        folder: where runs, tables and the cache would be made.
    """
    yield check_python(sys.version_info[:3])
    yield _guarded("packages", "environment", "make setup", check_packages)
    yield check_extras()
    yield check_processors()
    yield check_memory(_available_memory())
    yield check_disk(folder, shutil.disk_usage(folder).free)
    for name in ("runs", "latency_tables", ".nas-cache"):
        yield check_writable(folder / name)
    yield _guarded("training", "environment", "make setup", check_training)
    yield _guarded("GPU", "device", "train on processors: --set search.accelerator=cpu", check_gpu)
    yield from check_devices()


def _guarded(name: str, area: Area, fix: str, check: Callable[[], Check]) -> Check:
    try:
        return check()
    except Exception as e:  # whatever goes wrong in a check is its result
        return Check(name, "FAIL", _reason(e), fix, area)


def _reason(error: BaseException) -> str:
    return " ".join(str(error).split()) if isinstance(error, NasError) else f"{type(error).__name__}: {error}"


def check_python(version: tuple[int, ...]) -> Check:
    """The interpreter is new enough."""
    text = f"{'.'.join(map(str, version))} ({sys.platform})"
    if version >= MIN_PYTHON:
        return Check("python", "OK", text)
    return Check("python", "FAIL", text, "Python 3.11 or newer: make setup PYTHON=/path/to/python3.11")


def check_packages() -> Check:
    """Every declared package is there and can be imported."""
    versions, broken = {}, []
    for line in importlib.metadata.requires("nas") or ():
        if "extra ==" in line:
            continue
        name = re.split(r"[^A-Za-z0-9_.-]", line)[0]
        try:
            versions[name] = importlib.metadata.version(name)
            importlib.import_module(IMPORT_NAMES.get(name.lower(), name))
        except Exception as e:  # a package may fail in any way while it is imported
            broken.append(f"{name}: {_reason(e)}")
    text = ", ".join(f"{name} {version}" for name, version in versions.items())
    if broken:
        return Check("packages", "FAIL", "; ".join(broken), "make setup", details={"versions": versions})
    return Check("packages", "OK", text, details={"versions": versions})


def check_extras() -> Check:
    """Optional packages, named with the extra that brings them."""
    found = {}
    for name in ("tensorrt", "pycuda"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = ""
    text = ", ".join(f"{name} {version or 'not installed'}" for name, version in found.items())
    return Check("extras", "OK", f"{text} (optional: for the device tensorrt)", details={"versions": found})


def check_processors() -> Check:
    """Processors that this process may use."""
    from nas.devices import usable_cores

    count = usable_cores()
    return Check("processors", "OK", f"{count} usable; students are trained on one each (search.workers)")


def _available_memory() -> int | None:
    """Bytes that can be used without swapping; None where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="ascii")
    except OSError:
        return None
    found = re.search(r"MemAvailable:\s+(\d+) kB", text)
    return int(found[1]) * 1024 if found else None


def check_memory(free: int | None) -> Check:
    """Enough memory for the quickstart."""
    if free is None:
        return Check("memory", "OK", "this system does not say how much is free")
    level: Level = "OK" if free >= MEMORY_WARN else "WARN" if free >= MEMORY_FAIL else "FAIL"
    fix = "end other programs, or use fewer workers: --set search.workers=1"
    return Check("memory", level, f"{format_bytes(free)} available; the quickstart needs up to 3 GB", fix)


def check_disk(folder: Path, free: int) -> Check:
    """Enough disk space where runs would be made."""
    level: Level = "OK" if free >= DISK_WARN else "WARN" if free >= DISK_FAIL else "FAIL"
    fix = "free some space, or put runs elsewhere: --set run.dir=DIR --set run.cache=DIR"
    return Check("disk", level, f"{format_bytes(free)} free in {folder}", fix, "storage")


def check_writable(folder: Path) -> Check:
    """A file can be written in a folder, or in the nearest folder above that exists."""
    place = next(p for p in (folder, *folder.parents) if p.exists())
    fix = f"chmod u+w '{place}', or choose another folder: --set run.dir=DIR"
    try:
        with tempfile.TemporaryFile(dir=place) as f:
            f.write(b"nas")
    except OSError as e:
        return Check(folder.name, "FAIL", f"{place}: {e.strerror or e}", fix, "storage")
    return Check(folder.name, "OK", f"{folder} can be written" if place == folder else f"{folder} can be made")


def check_training() -> Check:
    """A training step of a small network."""
    import torch

    first = torch.nn.Conv2d(3, 8, 3, stride=2)
    network = torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Conv2d(8, 4, 3))
    loss = torch.nn.functional.cross_entropy(network(torch.rand(4, 3, 16, 16)).mean((2, 3)), torch.arange(4))
    torch.autograd.backward(loss)
    if first.weight.grad is None or not float(first.weight.grad.abs().sum()) > 0:
        return Check("training", "FAIL", "a training step gave no gradient", "make setup")
    return Check("training", "OK", f"a training step on the CPU works, torch {torch.__version__}")


def check_gpu() -> Check:
    """A training of a small student on the first GPU gives what it gives on a processor."""
    import numpy as np
    import torch

    if not torch.cuda.is_available():
        return Check("GPU", "OK", "torch sees none; students are trained on processors (search.accelerator)")
    from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
    from nas.train.compute import CPU
    from nas.train.settings import DistillSettings
    from nas.train.targets import Targets
    from nas.train.trainer import new_student, train_student

    rng = np.random.default_rng(0)
    images, labels = rng.integers(0, 256, (1, 64, 16, 16, 3), np.uint8), rng.integers(0, 2, 64)
    images[0, labels == 1] //= 4
    logits = np.eye(2, dtype=np.float32)[labels][None]
    targets = Targets("bright or dark", images, logits, labels, (0.5,) * 3, (0.25,) * 3, Path())
    stages = (StageConfig((BlockConfig(8, 16, 8, stride=2, use_se=True),)),)
    student = Candidate(16, 2, StemConfig(8), stages, HeadConfig(), ())
    name, losses = torch.cuda.get_device_name(), []
    for device in (CPU, torch.device("cuda")):
        trained = train_student(new_student(student, 0).to(device), targets, DistillSettings(epochs=4), seed=0)
        losses.append(trained.epochs[-1].loss)
    if abs(losses[1] / losses[0] - 1) > GPU_TOLERANCE:
        text = f"{name}: a loss of {losses[1]:.4g} after a training that gives {losses[0]:.4g} on a processor"
        return Check("GPU", "FAIL", text, "train on processors: --set search.accelerator=cpu", "device")
    return Check("GPU", "OK", f"a training on {name} works; to train there: --set search.accelerator=cuda")


def _each_device(name: str, *how: Any) -> Iterator[Check]:
    """Boards that are joined by commas are looked at one by one: what is wrong may be that they differ."""
    for part in name.split(",") if name.startswith("ssh:") else (name,):
        yield from check_device(part, *how)


def check_device(
    name: str,
    say: Callable[[str], None],
    failed: Callable[[Exception], None],
    set_power_mode: str | None = None,
    lock_clocks: bool = False,
) -> Iterator[Check]:
    """One device: what it is and what is wrong with it, then inferences.

    Args:
        name: as for `nas.devices.open_device`.
        say: told in a line what the device has to say meanwhile.
        failed: told why it cannot be used.
        set_power_mode: name or id of a mode that is set first.
        lock_clocks: whether its clocks are locked first.
    """
    from nas.cli import boards
    from nas.devices import open_device
    from nas.devices.remote import RemoteDevice

    try:
        device = open_device(name, say)
    except UsageError:
        raise
    except Exception as e:  # whatever goes wrong is the result
        failed(e)
        yield boards.failed(name, e)
        return
    if isinstance(device, RemoteDevice):
        yield from _board_checks(device, set_power_mode, lock_clocks)
    yield from _inferences(device, name)


def _board_checks(board: Any, set_power_mode: str | None, lock_clocks: bool) -> Iterator[Check]:
    from nas.cli import boards

    by_hand = board.address.ssh.by_hand
    if set_power_mode is not None or lock_clocks:
        try:
            yield from boards.change_checks(board.change_power(set_power_mode, lock_clocks), by_hand)
        except NasError as e:
            yield Check("board changed", "FAIL", _reason(e), f"on the board itself: {by_hand}", "device")
    yield from boards.state_checks(board.state, by_hand)
    yield from boards.runner_checks(board.runners, by_hand)
    yield from boards.capability_checks(board.state, board.profile.runtime, board.profile.runtime_version)


def _inferences(device: Any, name: str) -> Iterator[Check]:
    look = _check_board_inference if name.startswith("ssh:") else check_inference
    fix = _inference_fix(name)
    for precision in device.profile.precisions:
        yield _guarded(f"device {name} {precision}", "device", fix, partial(look, device, name, precision))
    yield _guarded(f"device {name} clock", "device", fix, partial(check_clock, device, name))


def _inference_fix(name: str) -> str:
    """What to do where a runtime fails: on a board nothing that is done on this machine mends it."""
    return (
        f"to get help: nas doctor --device {quote(name)} --bundle send.zip" if name.startswith("ssh:") else "make setup"
    )


def _check_board_inference(device: Any, name: str, precision: Any) -> Check:
    """As `check_inference`; where the runtime gives no outputs, as trtexec does, a small network is measured."""
    from nas.core.walk import total_macs
    from nas.devices.base import MeasureJob

    try:
        return check_inference(device, name, precision)
    except DeviceError as e:
        candidate = _small_network().with_precision(precision)
        job = MeasureJob("doctor", "row", precision, _small_model(device, precision), total_macs(candidate))
        measured = device.measure([job])[0]
        if measured.latency_ms is None:
            return Check(f"device {name} {precision}", "FAIL", str(measured.error), _inference_fix(name), "device")
        text = (
            f"a small network takes {format_ms(measured.latency_ms)}; its outputs could not be compared: {_reason(e)}"
        )
        fix = "install the Python module of TensorRT on the board: sudo apt-get install python3-libnvinfer"
        return Check(f"device {name} {precision}", "WARN", text, fix, "device")


def check_devices() -> Iterator[Check]:
    """Each device: an inference in each of its precisions, then how quiet it is."""
    try:
        from nas.devices import DEVICE_NAMES, open_device
    except ImportError as e:
        yield Check("devices", "FAIL", _reason(e), "make setup", "device")
        return
    for name in DEVICE_NAMES:
        try:
            device = open_device(name)
        except Exception as e:  # a broken runtime may fail in any way
            yield Check(f"device {name}", "FAIL", _reason(e), "make setup", "device")
            continue
        yield from _inferences(device, name)


def check_inference(device: Any, name: str, precision: Any) -> Check:
    """A small network gives finite, repeatable answers that depend on the image."""
    import numpy as np

    size = _small_network().resolution
    model = _small_model(device, precision)
    images = np.random.default_rng(0).uniform(0, 255, (3, 3, size, size))
    first, second = (device.run(model, images.astype(np.float32))[0] for _ in range(2))
    profile = device.profile
    title = f"device {name} {precision}"
    if not (np.isfinite(first).all() and np.array_equal(first, second) and np.ptp(first, axis=0).max() > 0):
        return Check(title, "FAIL", "a small network gave wrong answers", _inference_fix(name), "device")
    text = f"a small network runs on {profile.board}, {profile.runtime} {profile.runtime_version}"
    return Check(title, "OK", text, area="device", details={"device": profile.name})


def _small_model(device: Any, precision: Any) -> bytes:
    from nas.export.dialect import dialect_for
    from nas.export.graph import network_model, nominal_quant, random_weights

    candidate = _small_network().with_precision(precision)
    quant = nominal_quant(candidate) if precision == "int8" else None
    weights, dialect = random_weights(candidate, 0), dialect_for(device.profile)
    return network_model(candidate, weights, (0.5,) * 3, (0.25,) * 3, quant=quant, dialect=dialect)


def check_clock(device: Any, name: str) -> Check:
    """How often the device is too disturbed to be measured, and how far its speed drifts."""
    calm = device.calm()
    text = (
        f"reference network {format_ms(calm.median_ms)} (best {format_ms(calm.best_ms)}, "
        f"worst {format_ms(calm.worst_ms)}), {calm.rejected} of {calm.checks} readings disturbed"
    )
    is_calm = calm.rejected_share <= REJECTED_WARN and calm.drift <= DRIFT_WARN
    fix = "end other programs and try again; disturbed rounds are repeated, so measuring only takes longer"
    details = {"rejected_share": calm.rejected_share, "drift": calm.drift, "cpu_share": calm.cpu_share}
    return Check(f"device {name} clock", "OK" if is_calm else "WARN", text, fix, "device", details)


def _small_network() -> Candidate:
    blocks = (
        BlockConfig(8, 16, 8),
        BlockConfig(8, 24, 16, kernel_size=5, stride=2, use_se=True, activation="hard_swish"),
    )
    return Candidate(16, 4, StemConfig(8), (StageConfig(blocks),), HeadConfig())
