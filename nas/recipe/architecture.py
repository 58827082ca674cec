"""A learned distribution over the networks of a space: the supernet's random sub-networks are those that matter.

One softmax per gene; a network's probability is the product. It learns from two terms: the expected latency under the
distribution, which is exact because the table is additive over places that depend on few genes (Cai, Zhu and Han 2019,
ProxylessNAS, arXiv 1812.00332, eq. 2-3), and the loss of the networks drawn, by REINFORCE (same, eq. 5). The latency
term is the relative distance to the deadline (Bender et al. 2020, TuNAS, arXiv 2008.06120, section 3.2), so networks
neither far above nor far below it are preferred. Differs: a share of every draw stays uniform, because the supernet is
to score all networks of the space.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nas.core.records import LayerSpec
from nas.space.space import SearchSpace

UNIFORM = 0.2  # share of a gene's probability that is not learned
LR = 6e-3  # ProxylessNAS, section 4: Adam, with no momentum
BASELINE_DECAY = 0.95

Genotype = tuple[int, ...]


@dataclass(frozen=True, slots=True, eq=False)
class SpaceLatency:
    """Latency of every layer of a space, place by place, and the deadline, ms.

    Fields:
        budget_ms: the deadline.
        genes: the genes on which each place depends.
        tables: ms over the choices of these genes, 0 where the layer is absent.
    """

    budget_ms: float
    genes: tuple[tuple[int, ...], ...]
    tables: tuple[Tensor, ...]

    @staticmethod
    def of(space: SearchSpace, row_ms: Callable[[LayerSpec], float], budget_ms: float) -> SpaceLatency:
        """From the rows of a table; exit heads are left out, because here every network has all of them."""
        slots = [slot for slot in space.slots() if slot.kind != "exit_head"]
        tables = (
            torch.tensor([0.0 if x is None else row_ms(x) for x in slot.layers], dtype=torch.float64).reshape(
                slot.shape
            )
            for slot in slots
        )
        return SpaceLatency(budget_ms, tuple(slot.genes for slot in slots), tuple(tables))

    def expected_ms(self, probabilities: Sequence[Tensor]) -> Tensor:
        """Mean latency of networks whose genes are drawn independently with these probabilities, exactly."""
        total = torch.zeros((), dtype=torch.float64)
        for genes, table in zip(self.genes, self.tables, strict=True):
            for gene in reversed(genes):
                table = table @ probabilities[gene]
            total = total + table
        return total


class GeneDistribution:
    """The distribution and its optimizer.

    Args:
        space: of the networks.
        latency: of its layers.
        weight: of the latency term.
    """

    def __init__(self, space: SearchSpace, latency: SpaceLatency, weight: float) -> None:
        self._space, self.latency, self._weight = space, latency, weight
        self._logits = [torch.zeros(size, dtype=torch.float64, requires_grad=True) for size in space.gene_sizes]
        self._optimizer = torch.optim.Adam(self._logits, lr=LR, betas=(0.0, 0.999))
        self._baseline = math.nan

    def probabilities(self) -> list[Tensor]:
        """Of the choices of each gene."""
        return [UNIFORM / len(z) + (1 - UNIFORM) * torch.softmax(z, 0) for z in self._logits]

    def expected_ms(self) -> float:
        """Expected latency now."""
        with torch.no_grad():
            return float(self.latency.expected_ms(self.probabilities()))

    def sample(self, rng: np.random.Generator) -> Genotype:
        """Genes of one network, not canonical."""
        with torch.no_grad():
            chances = [p.numpy() for p in self.probabilities()]
        return tuple(min(int(np.searchsorted(np.cumsum(p), rng.random())), len(p) - 1) for p in chances)

    def learn(self, genotypes: Sequence[Genotype], losses: Sequence[float]) -> None:
        """One step, with the losses of the networks that were drawn."""
        probabilities = self.probabilities()
        excess = self.latency.expected_ms(probabilities) / self.latency.budget_ms - 1
        objective = self._weight * excess.abs()
        for genotype, loss in zip(genotypes, losses, strict=True):
            if math.isnan(self._baseline):
                self._baseline = loss
            chance = torch.stack([p[g].log() for p, g in zip(probabilities, genotype, strict=True)]).sum()
            objective = objective + (loss - self._baseline) * chance / len(losses)
            self._baseline += (1 - BASELINE_DECAY) * (loss - self._baseline)
        self._optimizer.zero_grad()
        objective.backward()
        self._optimizer.step()

    def content(self) -> dict[str, Any]:
        """For a checkpoint; the table too, because rows may be measured anew before a killed training goes on."""
        return {
            "logits": [z.detach() for z in self._logits],
            "optimizer": self._optimizer.state_dict(),
            "baseline": self._baseline,
            "tables": list(self.latency.tables),
        }

    def load(self, content: dict[str, Any]) -> None:
        """Goes on from a checkpoint's content."""
        with torch.no_grad():
            for z, kept in zip(self._logits, content["logits"], strict=True):
                z.copy_(kept)
        self._optimizer.load_state_dict(content["optimizer"])
        self._baseline = content["baseline"]
        self.latency = SpaceLatency(self.latency.budget_ms, self.latency.genes, tuple(content["tables"]))
