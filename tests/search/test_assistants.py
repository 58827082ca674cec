"""Assistants between teacher and small finalists: which, who learns from them, and that they are trained once."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from search_examples import Notes, Prepared

from nas.core.jsonio import read_record
from nas.core.walk import total_macs
from nas.recipe.context import ContextFile, open_context
from nas.recipe.deployed import deployed_logits
from nas.recipe.finish import load_finished
from nas.search.assistants import (
    LARGE_GAP,
    LEAST_STEP,
    choose_assistants,
    sizes_between,
    teach,
    why_no_more,
)
from nas.search.finals import finish
from nas.search.settings import FinishSettings
from nas.space.space import SearchSpace
from nas.train.settings import DistillSettings


@pytest.fixture(scope="module")
def space(prepared: Prepared) -> SearchSpace:
    return prepared.inputs.space


def test_sizes_rise_from_the_smallest_to_the_largest_of_the_space(space: SearchSpace) -> None:
    sizes = sizes_between(space)
    macs = [total_macs(c) for c in sizes]
    assert macs == sorted(macs)
    assert len(sizes) > 3
    assert macs[0] == total_macs(space.decode(space.smallest()).architecture)
    assert all(not c.exits and space.contains(c) for c in sizes)


def test_one_assistant_stands_in_the_middle_of_student_and_teacher(space: SearchSpace) -> None:
    sizes = [total_macs(c) for c in sizes_between(space)]
    low, high = sizes[0], sizes[-1]
    teacher = high**2 // low  # its geometric mean with the smallest is the largest network
    (assistant,) = choose_assistants(space, [low, high], teacher, 1)
    assert total_macs(assistant) == high
    assert choose_assistants(space, [high], teacher, 1) == ()  # nothing in the space is larger


def test_two_assistants_are_steps_and_are_left_out_where_the_space_has_no_room(space: SearchSpace) -> None:
    sizes = [total_macs(c) for c in sizes_between(space)]
    low, high = sizes[0], sizes[-1]
    chosen = choose_assistants(space, [low], high * 20, 2)
    macs = [total_macs(c) for c in chosen]
    assert macs[0] == high
    assert len(macs) == 2
    assert LEAST_STEP * low <= macs[1] <= macs[0] / LEAST_STEP
    assert choose_assistants(space, [low], int(1.2 * low), 2) == ()


def test_auto_takes_an_assistant_for_a_large_gap_only(space: SearchSpace) -> None:
    low = total_macs(sizes_between(space)[0])
    assert len(choose_assistants(space, [low, 9 * low], int(LARGE_GAP * low) + 1, "auto")) == 1
    assert choose_assistants(space, [low], int(LARGE_GAP * low) - 1, "auto") == ()
    assert choose_assistants(space, [low], None, "auto") == ()


def test_fewer_assistants_than_were_asked_for_are_told_with_the_reason(prepared: Prepared, tmp_path: Path) -> None:
    notes = Notes()
    parts = prepared.parts(tmp_path, notes)
    sizes = sizes_between(parts.space)
    low, high = total_macs(sizes[0]), total_macs(sizes[-1])
    between = f"no network of the space fits between the smallest finalist ({high / 1e6:.2f} M multiply-adds)"
    for finalist, teacher_macs, wanted, expected in (
        (
            sizes[0],
            int(12.5 * low),
            "auto",
            "no assistant: the teacher has 12.5 times the multiply-adds of the smallest",
        ),
        (sizes[0], None, "auto", "no assistant: the multiply-adds of the teacher are not known (an ONNX file)"),
        (sizes[-1], 10**12, "auto", f"no assistant: {between} and its teacher, 1.5 times as large"),
        (sizes[-1], None, 2, f"no assistant: {between} and its teacher, 1.5 times as large"),
    ):
        lessons = teach(parts, [finalist], DistillSettings(assistants=wanted), FinishSettings(), teacher_macs)
        assert not lessons.of
        assert notes.said.pop().startswith(expected)
        assert notes.said == []
    assert (why_no_more(2, [low], 10**9, 2), why_no_more(1, [low], 10**9, "auto")) == (None, None)
    few = why_no_more(1, [low], 10**9, 2)
    assert few is not None
    assert few.startswith("1 assistant instead of 2: no network of the space fits between the smallest finalist")


def test_small_finalists_learn_from_the_assistant_which_is_trained_once(prepared: Prepared, tmp_path: Path) -> None:
    parts = prepared.parts(tmp_path)
    sizes = sizes_between(parts.space)
    finalists = [sizes[0], sizes[-1]]
    distill, settings = DistillSettings(epochs=1, batch_size=20, assistants=1), FinishSettings(calibration_images=8)
    lessons = teach(parts, finalists, distill, settings, 10**9)
    assert set(lessons.of) == {sizes[0].arch_id}
    (step,) = lessons.of[sizes[0].arch_id].steps
    assert (step.name, step.epochs, step.cpu_s) == ("assistant", 1, lessons.cpu_s)
    assert sizes[-1].arch_id in step.note

    folder = parts.folder.path / "assistants" / sizes[-1].arch_id
    written = (folder / "finished.json").stat().st_mtime_ns
    taught = open_context(lessons.of[sizes[0].arch_id].context, 16)
    direct = open_context(parts.plan.context, 16)
    weights, _ = load_finished(folder)
    images = direct.targets.images[1]
    expected = deployed_logits(sizes[-1], weights, None, direct.mean, direct.std, images)[-1]
    np.testing.assert_array_equal(taught.targets.logits[1], expected)
    assert np.array_equal(taught.targets.images, direct.targets.images)
    assert taught.targets.key != direct.targets.key

    students, failed = finish(parts, finalists, distill, settings, lessons.of)
    assert failed == []
    assistants = {s.candidate.arch_id: [x for x in s.steps if x.name == "assistant"] for s in students}
    assert assistants == {sizes[0].arch_id: [step], sizes[-1].arch_id: []}
    assert teach(parts, finalists, distill, settings, 10**9) == lessons
    assert (folder / "finished.json").stat().st_mtime_ns == written
    assert read_record(ContextFile, folder / "context.json").targets == str(taught.targets.folder)


def test_no_assistants_by_default(prepared: Prepared, tmp_path: Path) -> None:
    notes = Notes()
    parts = prepared.parts(tmp_path, notes)
    lessons = teach(parts, sizes_between(parts.space), DistillSettings(), FinishSettings(), 10**9)
    assert not lessons.of
    assert not (parts.folder.path / "assistants").exists()
    assert notes.said == []
