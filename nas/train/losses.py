"""Losses of distillation: plain functions of tensors, put together by `student_loss`.

A further term (feature hints, attention transfer) is another function here and another addend in `student_loss`.
Letters: B batch, K classes, E exits with the head.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    soft = F.kl_div(
        F.log_softmax(student_logits / temperature, dim=1),
        F.log_softmax(teacher_logits / temperature, dim=1),
        reduction="batchmean",
        log_target=True,
    )
    loss = alpha * temperature**2 * soft
    if alpha < 1:
        loss = loss + (1 - alpha) * F.cross_entropy(student_logits, labels, label_smoothing=label_smoothing)
    return loss


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
    outputs: Sequence[Tensor], teacher_logits: Tensor, labels: Tensor, settings: DistillSettings
) -> Tensor:
    """The whole loss of one step.

    Args:
        outputs: logits [B, K] of each exit, head last.
        teacher_logits: [B, K], the same teacher for all exits.
        labels: [B].
        settings: temperature, alpha, label smoothing and exit weights are read.
    """
    losses = [
        hinton_kd(z, teacher_logits, labels, settings.temperature, settings.alpha, settings.label_smoothing)
        for z in outputs
    ]
    return branch_loss(losses, branch_weights(settings.exit_weights, len(outputs)))
