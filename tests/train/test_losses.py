import numpy as np
import pytest
import torch
from torch.nn import functional

from nas.core.errors import UsageError
from nas.core.records import BlockConfig, Candidate, HeadConfig, StageConfig, StemConfig
from nas.models.student import Student, attention_maps
from nas.train.losses import (
    FeaturePairs,
    attention_loss,
    attention_map,
    attention_map_kd,
    branch_loss,
    branch_weights,
    dist_relations,
    hint_loss,
    hinton_kd,
    student_loss,
)
from nas.train.settings import DistillSettings


def logits(seed: int) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 2, (6, 4)).astype(np.float32))


LABELS = torch.tensor([0, 1, 2, 3, 0, 1])


def test_alpha_zero_is_cross_entropy_and_alpha_one_ignores_labels() -> None:
    student, teacher = logits(0), logits(1)
    plain = functional.cross_entropy(student, LABELS)
    assert hinton_kd(student, teacher, LABELS, 3.0, 0.0).item() == pytest.approx(plain.item(), rel=1e-6)
    a = hinton_kd(student, teacher, LABELS, 3.0, 1.0)
    b = hinton_kd(student, teacher, LABELS.flip(0), 3.0, 1.0)
    assert a.item() == b.item()


def test_a_student_that_copies_the_teacher_has_no_teacher_loss() -> None:
    teacher = logits(1)
    assert hinton_kd(teacher + 7.0, teacher, LABELS, 4.0, 1.0).item() == pytest.approx(0.0, abs=1e-5)


def test_distillation_equals_the_formula_written_out() -> None:
    student, teacher, t, alpha = logits(0).numpy(), logits(1).numpy(), 2.5, 0.6

    def softmax(z: np.ndarray) -> np.ndarray:
        e = np.exp(z.astype(np.float64))
        return e / e.sum(1, keepdims=True)

    p, q = softmax(teacher / t), softmax(student / t)
    soft = (p * np.log(p / q)).sum(1).mean()
    hard = -np.log(softmax(student)[np.arange(6), LABELS.numpy()]).mean()
    expected = (1 - alpha) * hard + alpha * t**2 * soft
    got = hinton_kd(torch.from_numpy(student), torch.from_numpy(teacher), LABELS, t, alpha).item()
    assert got == pytest.approx(expected, rel=1e-5)


def attention(heads: int, seed: int) -> torch.Tensor:
    drawn = np.random.default_rng(seed).normal(0, 2, (2, heads, 9, 9)).astype(np.float32)
    return torch.from_numpy(drawn).softmax(dim=3)


def test_attention_maps_are_compared_by_the_mean_over_heads() -> None:
    student, teacher = attention(1, 0), attention(3, 1)
    q, p = student.double().mean(1), teacher.double().mean(1)
    expected = (p * (p / q).log()).sum(2).mean().item()
    assert attention_map_kd(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert attention_map_kd(teacher, teacher).item() == pytest.approx(0.0, abs=1e-6)
    with pytest.raises(UsageError, match=r"\[2, 1, 9, 9\] \(student\) and \[2, 3, 4, 4\] \(teacher\)"):
        attention_map_kd(student, teacher[:, :, :4, :4])


def test_a_student_learns_to_attend_as_a_second_student_does() -> None:
    torch.manual_seed(0)
    blocks = (BlockConfig(8, 16, 64, 3, 2, kind="attention"), BlockConfig(64, 64, 64, kind="attention"))
    teacher, student = (
        Student(Candidate(16, 3, StemConfig(8), (StageConfig(blocks[:depth]),), HeadConfig())) for depth in (2, 1)
    )
    images = torch.randn(8, 3, 16, 16)
    with torch.no_grad(), attention_maps(teacher) as wanted:
        teacher(images)
    step = torch.optim.Adam(student.parameters(), lr=3e-3)
    losses = []
    for _ in range(20):
        with attention_maps(student) as maps:
            student(images)
        losses.append(attention_map_kd(maps[-1], wanted[-1]))
        step.zero_grad()
        losses[-1].backward()
        step.step()
    assert losses[-1] < 0.5 * losses[0]


def test_gradients_keep_their_size_when_the_temperature_rises() -> None:
    sizes = []
    for t in (4.0, 8.0):
        student = logits(0).requires_grad_()
        hinton_kd(student, logits(1), LABELS, t, 1.0).backward()
        assert student.grad is not None
        sizes.append(student.grad.norm().item())
    assert sizes[1] == pytest.approx(sizes[0], rel=0.5)


@pytest.mark.parametrize(
    ("given", "exits", "expected"),
    [
        ((0.2, 0.3, 0.5), 1, (1.0,)),
        ((0.2, 0.3, 0.5), 2, (0.5, 1.0)),
        ((0.2, 0.3, 0.5), 3, (0.3, 0.5, 1.0)),
        ((0.2, 0.3, 0.5), 5, (0.2, 0.2, 0.3, 0.5, 1.0)),
        ((), 3, (0.0, 0.0, 1.0)),
    ],
)
def test_exit_weights_fit_any_number_of_exits(
    given: tuple[float, ...], exits: int, expected: tuple[float, ...]
) -> None:
    weights = branch_weights(given, exits)
    assert sum(weights) == pytest.approx(1.0)
    assert weights == pytest.approx([w / sum(expected) for w in expected])


def test_branch_loss_is_the_weighted_sum() -> None:
    losses = [torch.tensor(2.0), torch.tensor(4.0)]
    assert branch_loss(losses, (0.25, 0.75)).item() == pytest.approx(3.5)


def test_every_exit_learns_from_the_teacher() -> None:
    outputs = [logits(i).requires_grad_() for i in range(3)]
    student_loss(outputs, logits(9), LABELS, DistillSettings()).backward()
    assert all(z.grad is not None and z.grad.abs().sum() > 0 for z in outputs)


def test_relations_of_dist_equal_the_correlations_written_out() -> None:
    student, teacher, t = logits(0), logits(1), 2.0
    p, q = (torch.softmax(z / t, 1).double().numpy() for z in (student, teacher))
    inter = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p, q, strict=True)])
    intra = np.mean([1 - np.corrcoef(a, b)[0, 1] for a, b in zip(p.T, q.T, strict=True)])
    got = [float(value) for value in dist_relations(student, teacher, t)]
    assert got == pytest.approx([t**2 * inter, t**2 * intra], rel=1e-4)
    assert [float(v) for v in dist_relations(teacher, teacher, t)] == pytest.approx([0.0, 0.0], abs=1e-5)


def feature_maps(seed: int, channels: int = 3, side: int = 4) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(seed).normal(0, 1, (6, channels, side, side)).astype(np.float32))


def test_hints_compare_at_the_smaller_side_and_as_a_share_of_the_teacher() -> None:
    student, teacher = feature_maps(0), feature_maps(1, side=2)
    pooled = functional.avg_pool2d(student, 2)
    expected = float((pooled - teacher).square().mean() / teacher.square().mean())
    assert hint_loss(student, teacher).item() == pytest.approx(expected, rel=1e-5)
    assert hint_loss(10 * student, 10 * teacher).item() == pytest.approx(expected, rel=1e-5)
    assert hint_loss(teacher, teacher).item() == 0


def test_attention_sees_where_a_map_is_active_and_not_how_strongly() -> None:
    teacher = attention_map(feature_maps(1))
    assert attention_loss(attention_map(5 * feature_maps(1)), teacher).item() == pytest.approx(0, abs=1e-9)
    corners = torch.zeros(6, 1, 4, 4), torch.zeros(6, 1, 4, 4)
    corners[0][:, :, 0, 0] = corners[1][:, :, 3, 3] = 1.0
    assert attention_loss(*corners).item() == pytest.approx(2.0)  # orthogonal unit vectors
    assert attention_loss(functional.interpolate(corners[0], 8), corners[0]).item() == pytest.approx(0, abs=1e-9)


def test_self_distillation_pulls_the_exits_to_the_head_and_leaves_the_head_alone() -> None:
    off, on = DistillSettings(alpha=0.0), DistillSettings(alpha=0.0, self_distillation=1.0)
    gradients = []
    for settings in (off, on):
        outputs = [logits(i).requires_grad_() for i in range(2)]
        student_loss(outputs, logits(9), LABELS, settings).backward()
        gradients.append([z.grad for z in outputs])
    assert torch.equal(gradients[0][1], gradients[1][1])
    assert not torch.allclose(gradients[0][0], gradients[1][0])


def test_every_term_counts_by_its_weight_and_none_when_it_is_off() -> None:
    pairs = FeaturePairs(
        ((feature_maps(0), feature_maps(1)),), ((attention_map(feature_maps(0)), attention_map(feature_maps(1))),)
    )

    def loss(**settings: float) -> float:
        return student_loss([logits(0)], logits(1), LABELS, DistillSettings(**settings), pairs).item()

    plain = loss()
    assert loss(hints=2.0) == pytest.approx(plain + 2 * hint_loss(*pairs.hints[0]).item(), rel=1e-5)
    assert loss(attention=3.0) == pytest.approx(plain + 3 * attention_loss(*pairs.attention[0]).item(), rel=1e-5)
    inter, intra = dist_relations(logits(0), logits(1), 1.0)
    assert loss(dist_inter=2.0, dist_intra=0.5) == pytest.approx(
        plain + 2 * inter.item() + 0.5 * intra.item(), rel=1e-5
    )
