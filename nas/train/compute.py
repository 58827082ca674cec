"""Where trainings run: on processor cores, or on a GPU through CUDA.

A network is trained where its weights are: whoever makes it moves it there, and everything else follows. So there is
one code for both, and a worker process on a host without a GPU can take the jobs of a search that others do on one.

Mixed precision (Micikevicius et al. 2018, arXiv 1710.03740) is bfloat16 on GPUs that compute it (Ampere and newer): it
has the range of float32, so no loss is scaled. Older GPUs train in float32. On processors students train in float32:
bfloat16 costs them more than twice the time, for depthwise convolutions have no kernels for it.
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from torch import nn

from nas.core.errors import ConfigError
from nas.train.settings import Accelerator

CPU = torch.device("cpu")
WORKERS_PER_GPU = 4  # a small network leaves most of a GPU idle; each process takes about half a GB of its memory


def check_accelerator(accelerator: Accelerator) -> None:
    """Looks for what a search asks for, before any long work.

    Raises:
        ConfigError: this process sees no GPU; the message says how to do without.
    """
    if accelerator == "cuda" and not torch.cuda.is_available():
        kind = f"is built for CUDA {torch.version.cuda}" if torch.version.cuda else "is built without CUDA"
        raise ConfigError(
            f"search.accelerator: 'cuda' is wanted, and torch {torch.__version__} ({kind}) sees no GPU here. Look at "
            "nvidia-smi and at CUDA_VISIBLE_DEVICES, or train on processors: --set search.accelerator=cpu"
        )


def training_device(accelerator: Accelerator) -> torch.device:
    """Where this process trains: on the GPU where that is wanted and there is one, else on a processor."""
    return torch.device("cuda" if accelerator == "cuda" and torch.cuda.is_available() else "cpu")


def gpu_count(accelerator: Accelerator) -> int:
    """GPUs that this process sees and may train on."""
    return torch.cuda.device_count() if accelerator == "cuda" else 0


def device_of(module: nn.Module) -> torch.device:
    """Where the weights of a module are."""
    return next(module.parameters()).device


def computes_bf16(device: torch.device) -> bool:
    """Whether this device is faster in bfloat16 than in float32; asked for GPUs."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device) >= (8, 0)


def mixed_precision(device: torch.device) -> AbstractContextManager[object]:
    """Around a forward pass in training: bfloat16 where a GPU computes it, nothing elsewhere."""
    return torch.autocast("cuda", torch.bfloat16) if computes_bf16(device) else nullcontext()
