"""Deploys a package: checks its answers on the device, measures it there, judges it, and teaches the latency table.

On a board behind SSH the folder is also copied there and its own scripts are run: what a user will run later is what is
checked now.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nas.core.errors import DeviceError, UsageError
from nas.core.records import Candidate, DeviceProfile, LatencyFigures, Measurement
from nas.core.run import LatencyKind
from nas.devices.agent import packed_agent
from nas.devices.base import Device, MeasureJob
from nas.devices.folders import last_line, send_folder
from nas.devices.remote import RemoteDevice
from nas.export.dialect import dialect_for
from nas.export.forms import (
    limited_deviation_ms,
    measured_figures,
    measured_paths,
    median_figures,
    path_shares,
    reachable_exits,
)
from nas.export.manifest import Manifest, PackageForm, PackageLatency, Verdict, judge, path_latency
from nas.export.package import (
    Package,
    ParityResult,
    check_scripts,
    complete_package,
    read_artefact,
    verify_package,
)
from nas.latency.fitting import fit_correction
from nas.latency.lines import NetworkForm, network_key
from nas.latency.table import LatencyTable
from nas.measure.fill import WAIT_S, open_session, state_check
from nas.measure.networks import measure_networks, store_network

BUILD_LIMIT_S = 3600.0  # of all engines of a package: TensorRT takes minutes for each on a Nano
SCRIPT_LIMIT_S = 600.0


@dataclass(frozen=True, slots=True)
class ScriptRun:
    """What a script of the package said on the board: exit status, and its JSON object."""

    script: str
    code: int
    told: dict[str, Any]


@dataclass(frozen=True, slots=True)
class Deployment:
    """What came of a deployment.

    `figures` are those of undisturbed runs, `medians` what the deadline was compared with. `stored` is the key under
    which the table of the device learnt the network. `transfer_ms` is what copying inputs and outputs of the whole
    network takes beside its latency, None where nothing is copied or the runtime does not tell. `folder` is where the
    package lies on the board, and `scripts` what its own scripts said there; empty in-process.
    """

    package: Package
    device: DeviceProfile
    parity: ParityResult
    latency: PackageLatency
    medians: LatencyFigures
    margin_ms: float
    budget_ms: float | None
    budget_of: LatencyKind
    verdict: Verdict
    reasons: tuple[str, ...]
    stored: str
    transfer_ms: float | None = None
    folder: str = ""
    scripts: tuple[ScriptRun, ...] = field(default=())

    @property
    def is_good(self) -> bool:
        return self.verdict == "good"


def deploy(
    folder: Path,
    device: Device,
    table: LatencyTable,
    *,
    budget_ms: float | None = None,
    of: LatencyKind | None = None,
    margin_std: float = 0.0,
    progress: Callable[[str, float], None] = lambda *_: None,
    wait_s: float = WAIT_S,
) -> Deployment:
    """Checks, measures and judges a package on a device; the table and a package without a latency are completed.

    Args:
        folder: the package.
        device: where it is to run.
        table: opened for the device's state; learns the network.
        budget_ms: deadline; None: that of the package.
        of: which latency it limits; None: as the package says.
        margin_std: standard deviations of the measurement by which its median must stay below the deadline.
        progress: told what is done, and how much of it (0-1).
        wait_s: how long to wait while another process writes the table, seconds.

    Raises:
        PackageError: the package is not whole.
        UsageError: its graphs were written for another runtime.
        DeviceError: the device cannot run or measure it, or answers otherwise than the package says.
    """
    progress("files", 0.0)
    package = verify_package(folder).package
    manifest = package.manifest
    check_runtime(package, device.profile)
    progress("answers", 0.0)
    parity = verify_package(folder, device.run).parity
    if parity is None or not parity.passes(manifest.parity.tolerance):
        raise DeviceError(
            f"{folder}: on {device.profile.name} the package does not give the answers that it carries ({parity}; "
            f"allowed: {manifest.parity.tolerance}). Its accuracy does not hold there; export it for this device"
        )
    artefact = read_artefact(folder, manifest)
    shares = path_shares(manifest.candidate, manifest.form, manifest.accuracy.exit_shares)
    known = deployed_candidate(manifest.candidate, manifest.form)
    form: NetworkForm = "plain" if not known.exits else "logits" if manifest.form == "segments" else "if"
    key = network_key(known, form)

    def measure(models: Sequence[bytes]) -> Sequence[Measurement]:
        label = known.precision_label
        jobs = [MeasureJob(f"{key}#{i}", "network", label, model, manifest.macs) for i, model in enumerate(models)]
        return device.measure(jobs, progress=lambda share: progress("latency", share))

    with table.writing(wait_s, lambda message: progress(message, 0.0)):
        open_session(table, device)
        check_state = state_check(table, device)
        exits, measurements = measured_paths(manifest.candidate, manifest.form, artefact, measure)
        figures = measured_figures(measurements, tuple(shares.values()))
        check_state()
        if form != "logits":
            # what passes the whole network is a network as the table knows them
            store_network(table, replace(measurements[-1], key=key), known, form)
    if form == "logits":
        # a chain is no such network: the same layers in one engine are what corrects the table
        measure_networks(
            table, device, [known], form=form, progress=lambda p: progress("feedback", p.done), wait_s=wait_s
        )
    _correct(table, wait_s)
    paths = tuple(path_latency(m, k, share) for m, k, share in zip(measurements, exits, shares.values(), strict=True))
    medians = median_figures(measurements, paths)
    kind = of or manifest.budget_of
    limit_ms = manifest.budget_ms if budget_ms is None else budget_ms
    margin_ms = margin_std * limited_deviation_ms(measurements, tuple(shares.values()), kind)
    latency = PackageLatency(figures, paths, device.profile, measurements[-1].clock, measurements[-1].measured_at)
    verdict, reasons = judge(
        manifest.accuracy,
        medians,
        budget_ms=limit_ms,
        budget_of=kind,
        margin_ms=margin_ms,
        reference_top1=manifest.reference_top1,
        max_loss=manifest.max_loss,
    )
    if manifest.latency is None:
        changed = replace(
            manifest,
            latency=latency,
            budget_ms=limit_ms,
            budget_of=kind,
            margin_ms=margin_ms,
            verdict=verdict,
            reasons=reasons,
        )
        package = complete_package(folder, changed)
    return Deployment(
        package,
        device.profile,
        parity,
        latency,
        medians,
        margin_ms,
        limit_ms,
        kind,
        verdict,
        reasons,
        key,
        measurements[-1].transfer_ms,
    )


def _correct(table: LatencyTable, wait_s: float) -> None:
    """Fits the table's correction to all of its networks, so that the next estimate knows the one that was deployed."""
    with table.writing(wait_s):
        fitted = fit_correction(table)
        if fitted.fits:  # none where the table lacks the rows of every network
            table.save_correction(fitted.correction)


def check_runtime(package: Package, profile: DeviceProfile) -> None:
    """Refuses a package whose graphs were written for another runtime than the device has.

    Raises:
        UsageError: with the command that exports the right one.
    """
    wanted, has = dialect_for(profile).name, package.manifest.dialect
    if wanted == has:
        return
    target = "ort" if wanted == "ort" else f"tensorrt:{profile.runtime_version}"
    run = package.manifest.provenance.get("run", "RUN")
    raise UsageError(
        f"{package.folder}: its graphs are of dialect {has}; {profile.name} ({profile.runtime} "
        f"{profile.runtime_version}) reads {wanted}. Export it for that: nas export runs/{run} --student "
        f"{package.manifest.name} --for {target} --output DIR"
    )


def deployed_candidate(candidate: Candidate, form: PackageForm) -> Candidate:
    """The network that a package holds: exits that no image can take are not in it, nor what lies behind the last."""
    if form == "plain" or not candidate.exits:
        return replace(candidate, exits=())
    reachable = reachable_exits(candidate)
    if reachable[-1] < len(candidate.exits):
        candidate = candidate.truncated(reachable[-1])
    kept = tuple(place for k, place in enumerate(candidate.exits) if k in reachable)
    return replace(candidate, exits=kept).with_thresholds((None,) * len(kept))


def run_on_board(deployment: Deployment, board: RemoteDevice, target: str, say: Callable[[str], None]) -> Deployment:
    """Copies a package to the board and runs its own scripts there, while nobody else measures or deploys on it.

    Args:
        deployment: of the package on that board.
        board: it; what is running there ends when its connection does.
        target: folder there, relative to the home folder or absolute.
        say: told in a line what is done.

    Raises:
        PackageError: a script of the package is not the one of this version.
        RemoteError: the board cannot be used.
        DeviceError: an engine could not be built, or the scripts get other answers than the package carries.
    """
    check_scripts(deployment.package, packed_agent().data)
    with board.held():
        say(f"copying the package to {board.address.ssh.shown}:{target}")
        package = deployment.package
        files = {name: (package.folder / name).read_bytes() for name in (*package.manifest.files, "manifest.json")}
        send_folder(board.ssh, files, target, "manifest.json")
        return replace(deployment, folder=target, scripts=tuple(_script_runs(deployment, board, target, say)))


def _script_runs(
    deployment: Deployment, board: RemoteDevice, target: str, say: Callable[[str], None]
) -> Iterator[ScriptRun]:
    where = f"{board.address.ssh.shown}: {target}"
    if "build_engine.py" in deployment.package.manifest.files:
        say("building its engines there")
        built = _script(board, target, "build_engine.py", [], BUILD_LIMIT_S)
        if built.code != 0:
            raise DeviceError(f"{where}/build_engine.py: {built.told.get('error')}")
        yield built
    say("checking its answers there")
    checked = _script(board, target, "parity.py", [], SCRIPT_LIMIT_S)
    if checked.code != 0:
        raise DeviceError(f"{where}/parity.py fails: {checked.told.get('error') or json.dumps(checked.told)}")
    yield checked
    say("timing it there")
    options = [] if deployment.budget_ms is None else ["--budget-ms", repr(deployment.budget_ms)]
    timed = _script(board, target, "bench.py", [*options, "--of", deployment.budget_of], SCRIPT_LIMIT_S)
    if timed.code not in (0, 1):  # 1: its own times miss the deadline, which the verdict of the protocol decides
        raise DeviceError(f"{where}/bench.py: {timed.told.get('error')}")
    yield timed


def _script(board: RemoteDevice, target: str, script: str, options: Sequence[str], limit_s: float) -> ScriptRun:
    code, out, said = board.run_script(target, script, [*options, "--json"], limit_s)
    lines = [line for line in out.splitlines() if line.startswith("{")]
    try:
        told = json.loads(lines[-1]) if lines else {}
    except ValueError:
        told = {}
    if not isinstance(told, dict) or not told:
        where = f"{board.address.ssh.shown}: {target}/{script}"
        raise DeviceError(f"{where} ended with status {code}: {last_line(said)}")
    return ScriptRun(script, code, told)


def board_folder(manifest: Manifest) -> str:
    """Where a package lies on a board by default, below the home folder."""
    return f"nas-packages/{manifest.name}"
