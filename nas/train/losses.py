"""Losses of distillation: plain functions of tensors, put together by `student_loss`.

A further term is another function here and another addend in `student_loss`.
Letters: B batch, K classes, E exits with the head, C channels, H W pixels of a feature map.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from nas.core.errors import UsageError
from nas.train.settings import DistillSettings


def hinton_kd(
    student_logits: Tensor,
    teacher_logits: Tensor,
    labels: Tensor,
    temperature: float,
    alpha: float,
    label_smoothing: float = 0.0,
) -> Tensor:
    """(1 - alpha) CE(labels) + alpha T^2 KL(teacher / T || student / T), mean over the batch.

    Source: Hinton, Vinyals, Dean 2015, arXiv 1503.02531, section 2; T^2 keeps the gradients' size.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        labels: [B], class numbers.
        temperature: T.
        alpha: share of the teacher, 0-1.
        label_smoothing: of the label part.
    """
    loss = alpha * temperature**2 * soft_kl(student_logits, teacher_logits, temperature)
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return loss


def soft_kl(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> Tensor:
    """KL(teacher / T || student / T) of logits [B, K], mean over the batch."""
    return F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )


def dist_relations(student_logits: Tensor, teacher_logits: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """What is left of a perfect Pearson correlation between student and teacher: inter-class and intra-class loss.

    Inter: of the K probabilities of each image; intra: of the B probabilities of each class. A student may so differ in
    scale and shift from the teacher. Source: Huang et al. 2022, "Knowledge Distillation from A Stronger Teacher",
    arXiv 2205.10536, eq. 8-10, with the factor T^2 of the authors' code.

    Args:
        student_logits: [B, K].
        teacher_logits: [B, K].
        temperature: T of the softmax of both.
    """
    p, q = F.softmax(student_logits / temperature, dim=1), F.softmax(teacher_logits / temperature, dim=1)
    scale = temperature**2
    return scale * (1 - _pearson(p, q, 1).mean()), scale * (1 - _pearson(p, q, 0).mean())


def _pearson(a: Tensor, b: Tensor, dim: int) -> Tensor:
    return F.cosine_similarity(a - a.mean(dim, keepdim=True), b - b.mean(dim, keepdim=True), dim=dim)


def hint_loss(adapted: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance of an adapted student map [B, C, H, W] to the teacher's, as a share of the teacher's square.

    The larger map is averaged to the side of the smaller. Source: Romero et al. 2015, FitNets, arXiv 1412.6550, eq. 3.
    Differs: relative to the teacher's mean square, so that one weight suits all layers and teachers; the 1x1 regressor
    is trained along with everything else instead of in a stage of its own.
    """
    adapted, teacher = _to_smaller(adapted, teacher)
    return (adapted - teacher).square().mean() / teacher.square().mean().clamp_min(1e-6)


def attention_map(features: Tensor) -> Tensor:
    """Where a map [B, C, H, W] is active: mean square over its channels, [B, 1, H, W]."""
    return features.square().mean(1, keepdim=True)


def attention_loss(student: Tensor, teacher: Tensor) -> Tensor:
    """Squared distance between two attention maps [B, 1, H, W] of unit length each, mean over the batch.

    The larger map is averaged to the side of the smaller. Source: Zagoruyko and Komodakis 2017, arXiv 1612.03928, eq. 2
    with sums of squares (activation-based).
    """
    student, teacher = _to_smaller(student, teacher)
    distance = F.normalize(student.flatten(1)) - F.normalize(teacher.flatten(1))
    return distance.square().sum(1).mean()


def _to_smaller(a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
    side = min(a.shape[-1], b.shape[-1])
    return F.adaptive_avg_pool2d(a, side), F.adaptive_avg_pool2d(b, side)


@dataclass(frozen=True, slots=True, eq=False)
class FeaturePairs:
    """Maps of student and teacher of one step, in pairs.

    Fields:
        hints: adapted student map and teacher map, [B, C, H, W] each.
        attention: attention maps of student and teacher, [B, 1, H, W] each.
        attention_maps: what each token of student and teacher attends to, [B, 1, N, N] each.
    """

    hints: tuple[tuple[Tensor, Tensor], ...] = ()
    attention: tuple[tuple[Tensor, Tensor], ...] = ()
    attention_maps: tuple[tuple[Tensor, Tensor], ...] = ()


def attention_map_kd(student_map: Tensor, teacher_map: Tensor) -> Tensor:
    """KL(teacher || student) of what each token attends to, mean over batch and tokens; heads are averaged first.

    Wang et al. 2020, MiniLM (arXiv 2002.10957), equation 1, on the last block with attention of both; differs: the mean
    over the heads, so that student and teacher may have different numbers of them. `nas.models.student.attention_maps`
    gives the maps of a student.

    Args:
        student_map: probabilities [B, heads, N, N], N tokens; the last dimension sums to 1.
        teacher_map: [B, any number of heads, N, N]; no gradient flows into it.

    Raises:
        UsageError: another number of images or tokens.
    """
    expected = (student_map.shape[0], *student_map.shape[2:])
    if (teacher_map.shape[0], *teacher_map.shape[2:]) != expected:
        raise UsageError(
            f"attention maps of {list(student_map.shape)} (student) and {list(teacher_map.shape)} (teacher): "
            "images and tokens must be as many; use attention on maps of one size"
        )
    least = torch.finfo(student_map.dtype).tiny  # a probability may have been rounded to 0
    student = student_map.mean(dim=1).clamp_min(least).log()
    teacher = teacher_map.detach().mean(dim=1).clamp_min(least).log()
    return F.kl_div(student, teacher, reduction="none", log_target=True).sum(dim=2).mean()


def branch_weights(exit_weights: Sequence[float], exits: int) -> tuple[float, ...]:
    """Loss weight of each of E exits, head last, summing to 1.

    Args:
        exit_weights: weights of the early exits relative to the head's 1, first exit first. A network with fewer exits
            uses the last of them, one with more repeats the first.
        exits: E, head included.
    """
    early = exits - 1
    given = tuple(exit_weights) or (0.0,)
    picked = (given[0],) * (early - len(given)) + given[max(0, len(given) - early) :] if early else ()
    total = sum(picked) + 1.0
    return (*(w / total for w in picked), 1.0 / total)


def branch_loss(losses: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """Weighted sum of the losses of all exits (BranchyNet, Teerapittayanon et al. 2016, arXiv 1709.01686, eq. 3)."""
    return torch.stack([weight * loss for weight, loss in zip(weights, losses, strict=True)]).sum()


def student_loss(
    outputs: Sequence[Tensor],
    teacher_logits: Tensor,
    labels: Tensor,
    settings: DistillSettings,
    features: FeaturePairs | None = None,
) -> Tensor:
    """The whole loss of one step.

    Args:
        outputs: logits [B, K] of each exit, head last.
        teacher_logits: [B, K], the same teacher for all exits.
        labels: [B].
        settings: temperature, alpha, label smoothing, and the weights of exits and of all further terms.
        features: maps for hints, attention transfer and attention maps, where these are on.
    """
    head = outputs[-1].detach()
    losses = []
    for place, z in enumerate(outputs):
        loss = hinton_kd(z, teacher_logits, labels, settings.temperature, settings.alpha, settings.label_smoothing)
        if settings.dist_inter or settings.dist_intra:
            inter, intra = dist_relations(z, teacher_logits, settings.dist_temperature)
            loss = loss + settings.dist_inter * inter + settings.dist_intra * intra
        if settings.self_distillation and place + 1 < len(outputs):
            # Zhang et al. 2019, arXiv 1905.08094, eq. 7, second term; differs: T^2, and no feature term.
            own = settings.self_distillation * settings.temperature**2
            loss = loss + own * soft_kl(z, head, settings.temperature)
        losses.append(loss)
    total = branch_loss(losses, branch_weights(settings.exit_weights, len(outputs)))
    if features is not None:
        for weight, term, pairs in (
            (settings.hints, hint_loss, features.hints),
            (settings.attention, attention_loss, features.attention),
            (settings.attention_maps, attention_map_kd, features.attention_maps),
        ):
            if pairs:
                total = total + weight * torch.stack([term(s, t) for s, t in pairs]).mean()
    return total
