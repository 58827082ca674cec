"""Which finalists learn from an assistant instead of the teacher, and the assistants themselves, chosen from the space.

Mirzadeh et al. 2020, arXiv 1902.03393: a student learns less from a teacher that is much larger than itself; an
assistant between them helps, best where it is as far from one as from the other (section 4, figure 4: by accuracy;
here: by the logarithm of multiply-adds, known before anything is trained). Several are steps of equal ratio.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

from nas.core.records import Candidate
from nas.core.run import FinishStep
from nas.core.walk import total_macs
from nas.recipe.assistant import assistant_context
from nas.recipe.finish import FinishJob, finish_student
from nas.recipe.pool import JobFailure
from nas.recipe.records import read_scored
from nas.search.rounds import SearchParts
from nas.search.settings import FinishSettings
from nas.space.space import SearchSpace
from nas.train.settings import DistillSettings

LARGE_GAP = 20.0  # teacher's multiply-adds over the student's, from which `auto` takes an assistant
LEAST_STEP = 1.5  # an assistant has so many times the multiply-adds of its students, and its teacher of its own


@dataclass(frozen=True, slots=True)
class Lesson:
    """Who teaches a finalist: the context with the answers, and the steps that led to them."""

    context: str
    steps: tuple[FinishStep, ...]


@dataclass(frozen=True, slots=True)
class Lessons:
    """Finalists that an assistant teaches, by `arch_id`, and the CPU seconds of all assistants."""

    of: Mapping[str, Lesson] = field(default_factory=dict)
    cpu_s: float = 0.0


def choose_assistants(
    space: SearchSpace, students: Sequence[int], teacher_macs: int | None, wanted: int | Literal["auto"]
) -> tuple[Candidate, ...]:
    """Assistants for a run, the largest first, each the teacher of the next one.

    Args:
        space: they are networks of it.
        students: multiply-adds of the finalists.
        teacher_macs: of the teacher; None where they are not known: the largest of the space is the first assistant.
        wanted: how many; `auto`: one, where the smallest finalist is `LARGE_GAP` times smaller than the teacher.
    """
    smallest = min(students)
    if wanted == "auto":
        wanted = 1 if teacher_macs is not None and teacher_macs >= LARGE_GAP * smallest else 0
    sizes = sizes_between(space)
    above: float = teacher_macs or total_macs(sizes[-1]) ** 2 / smallest
    chosen: list[Candidate] = []
    for left in range(wanted, 0, -1):
        aim = above ** (left / (left + 1)) * smallest ** (1 / (left + 1))
        nearest = min(sizes, key=lambda c: abs(math.log(total_macs(c) / aim)))
        macs = total_macs(nearest)
        if macs < LEAST_STEP * smallest or above < LEAST_STEP * macs:
            break
        chosen.append(nearest)
        above = macs
    return tuple(chosen)


def why_no_more(
    found: int, students: Sequence[int], teacher_macs: int | None, wanted: int | Literal["auto"]
) -> str | None:
    """Why there are fewer assistants than were asked for; None where there are as many.

    Args:
        found: how many `choose_assistants` gave.
        students, teacher_macs, wanted: as it was given them.
    """
    smallest = min(students)
    if wanted == "auto":
        if teacher_macs is None:
            return (
                "no assistant: the multiply-adds of the teacher are not known (an ONNX file), and distill.assistants: "
                "auto goes by them. Name a number: --set distill.assistants=1"
            )
        if teacher_macs < LARGE_GAP * smallest:
            return (
                f"no assistant: the teacher has {teacher_macs / smallest:.1f} times the multiply-adds of the smallest "
                f"finalist; distill.assistants: auto takes one from {LARGE_GAP:g} times on"
            )
        wanted = 1
    if found >= wanted:
        return None
    lacking = "no assistant" if not found else f"{found} assistant instead of {wanted}"
    return (
        f"{lacking}: no network of the space fits between the smallest finalist ({smallest / 1e6:.2f} M multiply-adds) "
        f"and {'its teacher' if not found else 'the first one'}, {LEAST_STEP:g} times as large as the one and as much "
        "smaller than the other"
    )


def sizes_between(space: SearchSpace) -> list[Candidate]:
    """Networks without exits from the smallest of the space to the largest, one choice at a time, all in step."""
    space = space.unpruned
    low, high = space.smallest(), space.largest()
    side = max(space.resolution)
    ways = enumerate(b - a for a, b in zip(low, high, strict=True))
    steps = sorted(((k + 0.5) / abs(way), gene) for gene, way in ways for k in range(abs(way)))
    genes, found = list(low), dict[str, Candidate]()
    for gene in (None, *(gene for _, gene in steps)):
        if gene is not None:
            genes[gene] += 1 if high[gene] > low[gene] else -1
        network = replace(space.decode(genes).architecture, resolution=side, exits=())
        found[network.arch_id] = network
    return sorted(found.values(), key=total_macs)


def teach(
    parts: SearchParts,
    finalists: Sequence[Candidate],
    distill: DistillSettings,
    settings: FinishSettings,
    teacher_macs: int | None,
) -> Lessons:
    """Trains the assistants that the finalists need, once per run, one after the other.

    Raises:
        InterruptedRunError: the run was asked to stop; every epoch is kept.
    """
    macs = {c.arch_id: total_macs(c) for c in finalists}
    asked = list(macs.values()), teacher_macs, distill.assistants
    assistants = choose_assistants(parts.space, *asked)
    if (why := why_no_more(len(assistants), *asked)) is not None:
        parts.reporter.say(why)
    context, steps, cpu_s = parts.plan.context, tuple[FinishStep, ...](), 0.0
    lessons: dict[str, Lesson] = {}
    for done, assistant in enumerate(assistants):
        parts.reporter.progress("assistants", done, len(assistants), f"{distill.epochs} epochs each")
        taught = _train(parts, assistant, context, distill, settings)
        if isinstance(taught, JobFailure):
            parts.reporter.warn(f"no assistant teaches: {assistant.arch_id} could not be trained: {taught.reason}")
            break
        context, step = taught
        steps, cpu_s = (*steps, step), cpu_s + step.cpu_s
        for arch_id, size in macs.items():
            if LEAST_STEP * size <= total_macs(assistant):
                lessons[arch_id] = Lesson(context, steps)
    if assistants:
        parts.reporter.progress("assistants", len(assistants), len(assistants), f"{len(lessons)} finalists need them")
    return Lessons(lessons, cpu_s)


def _train(
    parts: SearchParts, assistant: Candidate, context: str, distill: DistillSettings, settings: FinishSettings
) -> tuple[str, FinishStep] | JobFailure:
    folder = parts.folder.path / "assistants" / assistant.arch_id
    job = FinishJob(
        assistant,
        context,
        str(folder),
        parts.plan.stop_file,
        distill,
        parts.search.seed,
        settings.calibration_images,
        (),
        parts.plan.dialect,
    )
    (result,) = parts.pool.map(finish_student, [job], lambda: parts.stop.is_set)
    if isinstance(result.value, JobFailure):
        return result.value
    scored = read_scored(folder, "final-val-fp32")
    step = FinishStep(
        "assistant",
        result.value.epochs,
        scored.top1[-1] if scored is not None else 0.0,
        result.value.cost_s,
        f"learnt from {assistant.arch_id}, {total_macs(assistant) / 1e6:.2f} M multiply-adds",
    )
    return assistant_context(folder, assistant, context), step
