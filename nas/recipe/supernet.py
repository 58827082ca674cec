"""The `supernet` scorer: shared weights are trained once, any candidate of the space is scored with copies of them.

Sandwich rule (Yu & Huang 2019, arXiv 1903.05134): the largest and the smallest network are trained as often as random
ones, for they bound the others. Differs: all of them learn from the cached teacher instead of the largest one; every
exit the space allows is trained along in each of them, with a head that is drawn, so a score does not depend on which
exits were drawn; and the sandwich is spread over steps. A step has few networks, each on images of its own, instead of
all four on the same images: in a training of a minute or two, more steps and more images are worth more than quieter
gradients.

Everything at step t follows from (seed, t), and a checkpoint holds weights, optimizer and t, so a training that was
killed ends with the same weights as one that was not.

A space with pruned stages trains the shared weights of its unpruned networks, whose narrower ones have the first
channels. A pruned block is then cut from the narrowest of those that is wide enough, by the importance that its
channels have in the largest network, computed once after the training (`nas.recipe.pruning`).
"""

from __future__ import annotations

import math
import statistics
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load, save
from torch import Tensor, nn

from nas.compress.prune import channel_units, prunable
from nas.core.errors import ConfigError, RunMismatchError, StorageError
from nas.core.jsonio import content_hash, file_sha256, read_record, write_bytes, write_record
from nas.core.records import Candidate, ExitConfig
from nas.data import evenly
from nas.models.student import Student
from nas.models.supernet import Supernet
from nas.recipe.architecture import GeneDistribution, Genotype, SpaceLatency
from nas.recipe.processes import Processes, Result
from nas.recipe.pruning import (
    IMPORTANCE_FILE,
    SharedImportance,
    importance_of,
    narrowed_student,
    read_shared,
    write_shared,
)
from nas.recipe.settings import SupernetSettings
from nas.space.space import SearchSpace
from nas.train.compute import mixed_precision, training_device
from nas.train.evaluate import recalibrate_bn, threads
from nas.train.feed import Feed
from nas.train.loop import (
    LossGuard,
    batches,
    lr_share,
    parameter_groups,
    read_checkpoint,
    steps_per_epoch,
    write_checkpoint,
)
from nas.train.losses import student_loss
from nas.train.settings import Accelerator, DistillSettings
from nas.train.targets import Targets

SUPERNET_SCHEMA = 3
RECORD_FILE = "supernet.json"
WEIGHTS_FILE = "weights.safetensors"
CHECKPOINT_FILE = "supernet.ckpt"
PLAN_PERIODS = 3  # turns of the sub-networks that are timed and forgotten; their median gives the number of steps


@dataclass(frozen=True, slots=True)
class TrainedSupernet:
    """`supernet.json`: trained shared weights; `key` is the content hash of everything that decides them.

    `loss` is the mean over the sub-networks of the last step; `cpu_s` are processor seconds, planning included;
    `expected_ms` the expected latency of the random sub-networks at the end, where their distribution was learned.
    """

    schema: int
    key: str
    space: str
    steps: int
    loss: float
    cpu_s: float
    weights_sha256: str
    expected_ms: float | None = None


@dataclass(frozen=True, slots=True)
class SupernetStep:
    """One step that is over: `step` of `steps`, mean loss of its sub-networks, CPU seconds so far and probably left."""

    step: int
    steps: int
    loss: float
    cpu_s: float
    left_s: float


def train_supernet(
    space: SearchSpace,
    targets: Mapping[int, Targets],
    distill: DistillSettings,
    settings: SupernetSettings,
    folder: Path,
    *,
    workers: int = 1,
    progress: Callable[[SupernetStep], None] | None = None,
    processes: Processes | None = None,
    latency: SpaceLatency | None = None,
    accelerator: Accelerator = "cpu",
) -> TrainedSupernet:
    """Trains the shared weights of a space, or gives the record of those that are there.

    Args:
        space: sub-networks are drawn from it gene by gene, uniformly or from a distribution that is learned.
        targets: cached teacher targets for each resolution of the space, the same images in the same order.
        distill: the loss: temperature, alpha, label smoothing, exit weights, DIST and self-distillation; feature
            losses, curriculum and mining are for students of their own.
        settings: length and recipe.
        folder: run_dir/supernet; gets `weights.safetensors` and `supernet.json`, and a checkpoint on the way.
        workers: threads that share the sub-networks of a step; the weights are the same for any number of them.
        progress: called after every step; when it raises, the steps so far are kept and the error goes on.
        processes: those of torchrun that share the sub-networks of a step, all on one folder; None: this one alone.
        latency: of the layers of the space, needed where `settings.latency_weight` is above 0.
        accelerator: where it is trained; on a GPU one thread does it, and the weights depend on the order in which it
            adds.

    Raises:
        ConfigError: `settings.latency_weight` without latencies.
        TrainingError: the loss is not finite or runs away.
        RunMismatchError: the folder holds the supernet of another space, teacher, data set or settings.
        StorageError: files that cannot be read or written.
    """
    if settings.latency_weight and latency is None:
        raise ConfigError(
            "supernet.latency_weight: the latency of every layer of the space is needed. Use a smaller space, or let "
            "the rows be interpolated (--set feedback.max_rows=N), or set it to 0"
        )
    sampled = latency if settings.latency_weight else None
    device = training_device(accelerator)
    whole, space = space, space.unpruned
    key = content_hash(
        [
            SUPERNET_SCHEMA,
            space.sha256,
            settings,
            [
                distill.temperature,
                distill.alpha,
                list(distill.exit_weights),
                distill.exit_gradient,
                distill.label_smoothing,
            ],
            [distill.dist_inter, distill.dist_intra, distill.dist_temperature, distill.self_distillation],
            {str(side): t.answers_key for side, t in targets.items()},  # features teach nothing here
            None if sampled is None else sampled.budget_ms,
        ]
    )
    if (folder / RECORD_FILE).exists():
        done = read_record(TrainedSupernet, folder / RECORD_FILE)
        if done.key != key:
            raise RunMismatchError(
                f"{folder}: this supernet belongs to another space, teacher, data set or settings. "
                f"Delete the folder to train it anew, or undo the change"
            )
        _keep_importance(whole, targets, distill, folder, device)
        return done
    together = processes or Processes()
    workers = workers if device.type == "cpu" else 1
    with threads(1), ThreadPoolExecutor(workers, initializer=_start_thread) as pool:
        each = pool.map if workers > 1 else map
        training = _Training(space, targets, distill, settings, each, together, sampled, device)
        training.resume(folder / CHECKPOINT_FILE, key)
        training.run(folder / CHECKPOINT_FILE, key, progress)
    if together.writes:
        _write(training, folder, key, space)
        _keep_importance(whole, targets, distill, folder, device)
    together.wait()
    return read_record(TrainedSupernet, folder / RECORD_FILE)


def _write(training: _Training, folder: Path, key: str, space: SearchSpace) -> None:
    write_bytes(folder / WEIGHTS_FILE, save({n: p.cpu().contiguous() for n, p in training.net.state_dict().items()}))
    record = TrainedSupernet(
        SUPERNET_SCHEMA,
        key,
        space.sha256,
        training.steps,
        training.loss,
        training.cpu_s,
        file_sha256(folder / WEIGHTS_FILE),
        None if training.genes is None else training.genes.expected_ms(),
    )
    write_record(folder / RECORD_FILE, record)
    (folder / CHECKPOINT_FILE).unlink(missing_ok=True)


def _keep_importance(
    space: SearchSpace, targets: Mapping[int, Targets], distill: DistillSettings, folder: Path, device: torch.device
) -> None:
    """Writes how much each shared channel matters and in which widths each block was trained, for pruned stages."""
    if not space.is_pruned or (folder / IMPORTANCE_FILE).exists():
        return
    exits = all_exits(exit_heads(space.unpruned), np.random.default_rng(0))
    largest = replace(space.unpruned.decode(space.unpruned.largest()), exits=exits).architecture
    mine = targets[largest.resolution]
    images = evenly(mine.images[0], distill.recalibration_images)
    student = inherited_student(open_supernet(str(folder)), largest, images, mine.mean, mine.std, device=device)
    widths: dict[str, set[int]] = {}
    for slot in space.unpruned.slots():
        found = {layer.expanded_channels for layer in slot.layers if layer is not None and channel_units(layer)}
        widths.setdefault(slot.name, set()).update(found)
    trained = {name: tuple(sorted(found)) for name, found in widths.items() if found}
    write_shared(folder / IMPORTANCE_FILE, SharedImportance(importance_of(student, "taylor", mine, distill), trained))


@dataclass(frozen=True, slots=True, eq=False)
class _Gradients:
    """What one sub-network adds to a step: a gradient per parameter, None where it does not use it."""

    loss: float
    gradients: tuple[Tensor | None, ...]
    cpu_s: float
    thread: int


def _start_thread() -> None:
    torch.set_num_threads(1)  # both settings belong to the thread that makes them
    torch.set_flush_denormal(True)


class _Training:
    """State of one training: weights, optimizer, steps done, CPU seconds."""

    def __init__(
        self,
        space: SearchSpace,
        targets: Mapping[int, Targets],
        distill: DistillSettings,
        settings: SupernetSettings,
        run: Callable[..., Iterable[_Gradients]],
        processes: Processes,
        latency: SpaceLatency | None,
        device: torch.device,
    ) -> None:
        self._device = device
        self._feeds = {side: Feed(t, {}, device) for side, t in targets.items()}
        self._map, self._processes, self._latency = run, processes, latency
        self.space, self.targets, self.distill, self.settings = space, targets, distill, settings
        self.heads = exit_heads(space)
        self.extremes = (space.decode(space.largest()), space.decode(space.smallest()))
        self.step, self.steps, self.loss, self.cpu_s = 0, 0, 0.0, 0.0
        self.guard = LossGuard("supernet", settings.lr, "supernet.lr")
        first = next(iter(targets.values()))
        self._count, self._variants = len(first.labels), first.variants
        self._per_epoch = steps_per_epoch(self._count, settings.batch_size)
        self._start()

    def _start(self) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.settings.seed)
            self.net = Supernet.of(self.space).to(self._device, memory_format=torch.channels_last)
        groups = parameter_groups(self.net, self.settings.weight_decay)
        self.optimizer = torch.optim.AdamW(groups, lr=self.settings.lr, fused=True)
        self.genes: GeneDistribution | None = None
        if self._latency is not None:
            self.genes = GeneDistribution(self.space, self._latency, self.settings.latency_weight)

    def resume(self, path: Path, key: str) -> None:
        """Goes on from a checkpoint, or plans the number of steps."""
        content = read_checkpoint(path, key)
        if content is None:
            self.steps = self._processes.agreed(self.settings.steps or self._planned())
            return
        self.step, self.steps, self.cpu_s = content["step"], content["steps"], content["cpu_s"]
        self.guard.first = content["first_loss"]
        self.net.load_state_dict(content["weights"])
        self.optimizer.load_state_dict(content["optimizer"])
        if self.genes is not None:
            self.genes.load(content["genes"])

    def _planned(self) -> int:
        """Steps that fit into the CPU seconds, from a few that are timed and then forgotten."""
        self.steps = 1_000_000  # far away: the timed steps are at the very start of the schedule
        turn = 2 + self.settings.random_subnets
        period = turn // math.gcd(turn, self.settings.networks_per_step)  # steps after which the order repeats
        spent = self._one_step(0)  # the first step is slower than all others
        timed = [sum(self._one_step(k * period + i) for i in range(period)) for k in range(PLAN_PERIODS)]
        self.guard.first = None
        self._start()
        spent += sum(timed)
        self.cpu_s += spent
        return max(1, round((self.settings.cpu_seconds - spent) / (statistics.median(timed) / period)))

    def run(self, path: Path, key: str, progress: Callable[[SupernetStep], None] | None) -> None:
        """The steps that are left."""
        saved = self.step
        for step in range(self.step, self.steps):
            self.cpu_s += self._one_step(step)
            self.step = step + 1
            if self.step - saved >= self.settings.checkpoint_steps or self.step == self.steps:
                self._save(path, key)
                saved = self.step
            if progress is not None:
                left = self.cpu_s / self.step * (self.steps - self.step)
                try:
                    progress(SupernetStep(self.step, self.steps, self.loss, self.cpu_s, left))
                except BaseException:
                    if saved != self.step:
                        self._save(path, key)
                    raise

    def _save(self, path: Path, key: str) -> None:
        if not self._processes.writes:
            return
        content = {
            "step": self.step,
            "steps": self.steps,
            "cpu_s": self.cpu_s,
            "first_loss": self.guard.first,
            "weights": dict(self.net.state_dict()),
            "optimizer": self.optimizer.state_dict(),
            "genes": None if self.genes is None else self.genes.content(),
        }
        write_checkpoint(path, key, content)

    def _one_step(self, step: int) -> float:
        """One step with the summed gradients of its sub-networks; CPU seconds of all threads."""
        started = time.thread_time()
        settings = self.settings
        for group in self.optimizer.param_groups:
            group["lr"] = settings.lr * lr_share(step, self.steps, settings.warmup)
        variant, index = self._batch(step)
        networks = min(settings.networks_per_step, len(index) // 2)  # the last batch of an epoch may be a small one
        work = partial(self._gradients, variant=variant)
        shares = np.array_split(index, max(1, networks))
        parameters = list(self.net.parameters())
        drawn = self._subnets(step)
        given_to = list(zip([candidate for candidate, _ in drawn], shares, strict=False))
        parts = self._parts(work, given_to, parameters)
        for i, parameter in enumerate(parameters):  # always in the order of the sub-networks, so that sums are equal
            given = [g for part in parts if (g := part.gradients[i]) is not None]
            # In the layout of the weights: the fused optimizer walks over memory and mixes up elements otherwise.
            parameter.grad = torch.empty_like(parameter).copy_(torch.stack(given).sum(0)) if given else None
        nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
        self.optimizer.step()
        self.loss = statistics.fmean(part.loss for part in parts)
        self.guard.step(self.loss, step // self._per_epoch)
        if self.genes is not None:
            random = [(g, part.loss) for (_, g), part in zip(drawn, parts, strict=False) if g is not None]
            self.genes.learn([g for g, _ in random], [loss for _, loss in random])
        here = threading.get_ident()
        return time.thread_time() - started + sum(part.cpu_s for part in parts if part.thread != here)

    def _parts(
        self,
        work: Callable[[Candidate, np.ndarray], _Gradients],
        shares: Sequence[tuple[Candidate, np.ndarray]],
        parameters: Sequence[Tensor],
    ) -> list[_Gradients]:
        """What every sub-network of a step gives, computed by the threads of this process or by all processes."""
        if self._processes.count == 1:
            return list(self._map(work, *zip(*shares, strict=True)))

        def one(number: int) -> Result:
            part = work(*shares[number])
            return part.gradients, (part.loss, part.cpu_s)

        told = self._processes.share(one, len(shares), parameters)
        here, rank, count = threading.get_ident(), self._processes.rank, self._processes.count
        return [
            _Gradients(loss, gradients, cpu_s, here if i % count == rank else 0)
            for i, (gradients, (loss, cpu_s)) in enumerate(told)
        ]

    def _gradients(self, candidate: Candidate, index: np.ndarray, variant: int) -> _Gradients:
        started = time.thread_time()
        batch = self._feeds[candidate.resolution].batch(variant, index)
        with mixed_precision(self._device):
            outputs = self.net(batch.images, candidate, self.distill.exit_gradient)
        loss = student_loss([z.float() for z in outputs], batch.logits, batch.labels, self.distill)
        # Not backward(): threads must not add to the same gradients, and sums in changing order would differ.
        gradients = torch.autograd.grad(loss, list(self.net.parameters()), allow_unused=True)
        return _Gradients(loss.item(), gradients, time.thread_time() - started, threading.get_ident())

    def _batch(self, step: int) -> tuple[int, np.ndarray]:
        """Variant and image numbers of a step."""
        epoch, i = divmod(step, self._per_epoch)
        rng = np.random.default_rng([self.settings.seed, epoch])
        order = list(batches(self._count, self.settings.batch_size, rng))
        return (epoch + self.settings.seed) % self._variants, order[i]

    def _subnets(self, step: int) -> list[tuple[Candidate, Genotype | None]]:
        """The networks of a step, with all exits: the next ones in the order largest, random, smallest, random.

        Random ones come with the genes as they were drawn.
        """
        turn = 2 + self.settings.random_subnets
        rng = np.random.default_rng([self.settings.seed, step, 1])
        result: list[tuple[Candidate, Genotype | None]] = []
        for number in range(self.settings.networks_per_step):
            place = (step * self.settings.networks_per_step + number) % turn
            genes: Genotype | None = None
            if place in (0, turn // 2):
                candidate = self.extremes[0 if place == 0 else 1]
            else:
                genes = self.space.sample(rng) if self.genes is None else self.genes.sample(rng)
                candidate = self.space.decode(self.space.canonical(genes))
            result.append((replace(candidate, exits=all_exits(self.heads, rng)), genes))
        return result


def exit_heads(space: SearchSpace) -> dict[int, tuple[tuple[int, int], ...]]:
    """Heads of the exit after each stage that may have one: pairs of convolution and hidden channels, rising."""
    return {
        slot.stage: tuple(sorted({(x.expanded_channels, x.hidden_channels) for x in slot.layers if x is not None}))
        for slot in space.slots()
        if slot.kind == "exit_head"
    }


def all_exits(heads: Mapping[int, Sequence[tuple[int, int]]], rng: np.random.Generator) -> tuple[ExitConfig, ...]:
    """Every exit that a candidate may have, in order, each with one of its heads (of `exit_heads`)."""
    chosen = {stage: own[int(rng.integers(len(own)))] for stage, own in sorted(heads.items())}
    return tuple(ExitConfig(stage, hidden, conv_channels=conv) for stage, (conv, hidden) in chosen.items())


def open_supernet(folder: str) -> Supernet:
    """Trained shared weights; kept in memory between calls, because a worker scores many candidates with them.

    Raises:
        StorageError: missing or damaged; the message says what to do.
    """
    path = Path(folder)
    return _open(path, read_record(TrainedSupernet, path / RECORD_FILE).weights_sha256)


@lru_cache(maxsize=1)
def _open(folder: Path, sha256: str) -> Supernet:
    path = folder / WEIGHTS_FILE
    try:
        data = path.read_bytes()
    except OSError as e:
        raise StorageError(f"{path}: cannot be read: {e}. Delete {folder} and run again to train it anew") from e
    if file_sha256(path) != sha256:
        raise StorageError(f"{path}: not the file that {RECORD_FILE} describes. Delete {folder} and run again")
    return Supernet.from_weights(load(data))


def shared_importance(folder: str) -> SharedImportance | None:
    """How much each shared channel matters; None where the space has no pruned stages.

    Raises:
        StorageError: damaged; the message says what to do.
    """
    path = Path(folder) / IMPORTANCE_FILE
    return read_shared(path) if path.exists() else None


def inherited_student(
    supernet: Supernet,
    candidate: Candidate,
    images: np.ndarray,
    mean: tuple[float, ...],
    std: tuple[float, ...],
    importance: SharedImportance | None = None,
    device: torch.device | None = None,
) -> Student:
    """A new student with copied weights and batch norm estimated on training images uint8 [N, H, W, 3], to evaluate.

    Args:
        supernet: trained.
        candidate: of the space, pruned blocks among them only with `importance`.
        images, mean, std: for batch norm.
        importance: which channels a pruned block keeps.
        device: where the student shall be; None: where the shared weights are.
    """
    target = candidate.architecture
    wide = target if importance is None else importance.widened(target)
    student = supernet.extract(wide).to(memory_format=torch.channels_last)
    if importance is not None and wide != target:
        layers = prunable(wide)
        own = {name: importance.blocks[name].first(layer) for name, layer in layers.items()}
        student = narrowed_student(student, target, own)
    if device is not None:
        student.to(device)
    recalibrate_bn(student, images, mean, std)
    return student.eval()
