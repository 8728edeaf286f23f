"""Real data and a few seconds of training for every tenant."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from torch_mux.demo.models import ResidualCNN, SmallTransformer

__all__ = ["Digits", "Tenant", "digits", "tenants", "train"]

BATCH = 64
RATE = 5e-3


@dataclass(frozen=True, eq=False)
class Digits:
    """scikit-learn's 1,797 handwritten digits: float32 images [N, 1, 8, 8] in [0, 1], int64 labels [N]."""

    images: Tensor
    labels: Tensor
    held_images: Tensor
    held_labels: Tensor


@dataclass(eq=False)
class Tenant:
    """One customer: a name, a model of its own, and what it was promised.

    Attributes:
        name: tenant name of the quota.
        model: its trained module, in eval mode.
        quota: keyword arguments of ``torch_mux.quota``.
        seed: of its weights and of its subset of the training images.
        epochs: how often it sees that subset.
        accuracy: on the held-out images, after training.
    """

    name: str
    model: nn.Module
    quota: dict[str, Any]
    seed: int
    epochs: int
    accuracy: float = 0.0


def digits(device: torch.device, held: int = 360) -> Digits:
    """The data set, shuffled the same way every time; the last ``held`` images are for serving."""
    from sklearn.datasets import load_digits

    found = load_digits()
    images = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(found.target, dtype=torch.int64)
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    images, labels = images[order].to(device), labels[order].to(device)
    return Digits(images[:-held], labels[:-held], images[-held:], labels[-held:])


def tenants(cnns: int, transformers: int, epochs: int | None = None) -> list[Tenant]:
    """Untrained tenants of two kinds, each with its own seed; ``epochs`` overrides how long they train."""
    made = []
    for index in range(cnns + transformers):
        torch.manual_seed(index)
        is_cnn = index < cnns
        model = ResidualCNN() if is_cnn else SmallTransformer()
        quota = {"sms": 0.5, "weight": 2.0} if is_cnn else {"sms": 1.0, "slo": "50ms"}
        name = f"cnn-{index + 1}" if is_cnn else f"transformer-{index - cnns + 1}"
        made.append(Tenant(name, model, quota, index, epochs or (4 if is_cnn else 10)))
    return made


def train(tenant: Tenant, data: Digits, step: Callable[[float], None]) -> None:
    """Trains on three quarters of the training images, another subset for every seed.

    Args:
        tenant: trained in place; left in eval mode with its accuracy.
        data: on the device to train on.
        step: told the fraction that is over, after every step.
    """
    model = tenant.model.to(data.images.device).train()
    generator = torch.Generator().manual_seed(tenant.seed)
    subset = torch.randperm(len(data.images), generator=generator)[: len(data.images) * 3 // 4]
    total = tenant.epochs * -(-len(subset) // BATCH)
    optimizer = torch.optim.AdamW(model.parameters(), lr=RATE, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=total)
    done = 0
    for _ in range(tenant.epochs):
        for indices in torch.split(subset[torch.randperm(len(subset), generator=generator)], BATCH):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(data.images[indices]), data.labels[indices])
            torch.autograd.backward(loss)
            optimizer.step()
            schedule.step()
            done += 1
            step(done / total)
    model.eval().requires_grad_(False)
    with torch.inference_mode():
        right = (model(data.held_images).argmax(1) == data.held_labels).float().mean()
    tenant.accuracy = float(right)
