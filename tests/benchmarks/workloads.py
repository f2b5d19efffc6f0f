"""The networks that the benchmarks train: a Transformer on bags, MLPs, and a ResNet on images.

Each is small enough for a CPU and stands for one way in which balancing can be slow: the passes
dominate (many tiles), arithmetic on gradients does (the MLPs: few operations per parameter), or
there are many small parameters (the ResNet).
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn

from examples.pathology.training.model import JointTransformer

F = nn.functional


class Batch(NamedTuple):
    """One batch: what goes in, and one target per task."""

    inputs: Tensor
    targets: dict[str, Tensor]


class Workload(NamedTuple):
    """A model on its device with a training and a validation batch of one size.

    The forward pass is cut in two, because some libraries want to see the features between trunk
    and heads.
    """

    family: str
    """"transformer", "mlp" or "resnet"."""
    model: nn.Module
    shared: list[nn.Module]
    """What is balanced."""
    heads: nn.ModuleDict
    """What belongs to one task. (A parameter of neither is reached by several tasks.)"""
    features: Callable[[Tensor], Tensor]
    """From inputs to what all heads see, with the batch as its first dimension."""
    loss: Callable[[str, Tensor, Tensor], Tensor]
    """From task, features and target to the raw loss."""
    training: Batch
    validation: Batch

    @property
    def tasks(self) -> tuple[str, ...]:
        return tuple(self.heads)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The shared parameters."""
        return [p for module in self.shared for p in module.parameters()]

    def losses_of(self, features: Tensor, batch: Batch) -> dict[str, Tensor]:
        """Return all losses on a batch, given its features."""
        return {task: self.loss(task, features, target) for task, target in batch.targets.items()}

    def losses(self) -> dict[str, Tensor]:
        """Make a forward pass on the training batch."""
        return self.losses_of(self.features(self.training.inputs), self.training)

    def validation_losses(self) -> dict[str, Tensor]:
        """Make a forward pass on the validation batch."""
        return self.losses_of(self.features(self.validation.inputs), self.validation)


def transformer(device: torch.device, tiles: int) -> Workload:
    """Return the joint Transformer of the pathology example on one bag: a class and a number."""
    torch.manual_seed(0)
    model = JointTransformer([2, 1]).to(device)
    position = {"msi": 0, "hrd": 1}

    def features(tiles: Tensor) -> Tensor:  # the model's own forward pass, without its heads
        memory = model.encoder(model.projector((tiles - model.mean) / model.scale))
        return model.decoder(torch.stack(list(model.tokens)).expand(len(tiles), -1, -1), memory)

    heads = nn.ModuleDict(dict(zip(position, model.heads, strict=True)))

    def loss(task: str, features: Tensor, target: Tensor) -> Tensor:
        output = heads[task](features[:, position[task]])
        return F.cross_entropy(output, target) if task == "msi" else F.mse_loss(output, target)

    def batch() -> Batch:
        targets = {"msi": torch.ones(1, dtype=torch.long), "hrd": torch.full((1, 1), 0.3)}
        return _on(device, torch.randn(1, tiles, 768), targets)

    shared = model.shared_modules()
    return Workload("transformer", model, shared, heads, features, loss, batch(), batch())


def mlp(device: torch.device, m: int, width: int = 1024, size: int = 128) -> Workload:
    """Return a trunk of four layers with one linear head per task, all regressions."""
    torch.manual_seed(0)
    layers = [layer for _ in range(4) for layer in (nn.Linear(width, width), nn.ReLU())]
    trunk = nn.Sequential(*layers)
    tasks = [f"task{number}" for number in range(m)]
    heads = nn.ModuleDict({task: nn.Linear(width, 1) for task in tasks})
    model = nn.ModuleList([trunk, heads]).to(device)

    def loss(task: str, features: Tensor, target: Tensor) -> Tensor:
        return F.mse_loss(heads[task](features), target)

    def batch() -> Batch:
        return _on(device, torch.randn(size, width), {t: torch.randn(size, 1) for t in tasks})

    return Workload("mlp", model, [trunk], heads, trunk, loss, batch(), batch())


def resnet(device: torch.device, size: int = 16, side: int = 64) -> Workload:
    """Return a network like ResNet-18 on colour images: two classes of targets and a number."""
    torch.manual_seed(0)
    trunk = nn.Sequential(
        nn.Conv2d(3, 64, 7, stride=2, padding=3, bias=False),
        nn.BatchNorm2d(64),
        nn.ReLU(),
        nn.MaxPool2d(3, stride=2, padding=1),
        *(_BasicBlock(64, 64, 1), _BasicBlock(64, 64, 1)),
        *(_BasicBlock(64, 128, 2), _BasicBlock(128, 128, 1)),
        *(_BasicBlock(128, 256, 2), _BasicBlock(256, 256, 1)),
        *(_BasicBlock(256, 512, 2), _BasicBlock(512, 512, 1)),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
    )
    widths = {"kind": 10, "scene": 5, "depth": 1}
    heads = nn.ModuleDict({task: nn.Linear(512, width) for task, width in widths.items()})
    model = nn.ModuleList([trunk, heads]).to(device)

    def loss(task: str, features: Tensor, target: Tensor) -> Tensor:
        output = heads[task](features)
        return F.mse_loss(output, target) if task == "depth" else F.cross_entropy(output, target)

    def batch() -> Batch:
        targets = {
            "kind": torch.randint(10, (size,)),
            "scene": torch.randint(5, (size,)),
            "depth": torch.randn(size, 1),
        }
        return _on(device, torch.randn(size, 3, side, side), targets)

    return Workload("resnet", model, [trunk], heads, trunk, loss, batch(), batch())


class _BasicBlock(nn.Module):
    """Two convolutions and a way round them."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
            nn.ReLU(),
            nn.Conv2d(outputs, outputs, 3, padding=1, bias=False),
            nn.BatchNorm2d(outputs),
        )
        self.skip: nn.Module = nn.Identity()
        if stride > 1 or inputs != outputs:
            self.skip = nn.Sequential(
                nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False), nn.BatchNorm2d(outputs)
            )

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.block(x) + self.skip(x))


def _on(device: torch.device, inputs: Tensor, targets: dict[str, Tensor]) -> Batch:
    return Batch(inputs.to(device), {task: target.to(device) for task, target in targets.items()})


def with_precision(workload: Workload, precision: str) -> Workload:
    """Return a workload whose forward passes run in a precision of ``PRECISIONS``.

    Only the forward pass: autograd makes the backward pass in the dtypes that it finds.
    """
    if precision == "float32":
        return workload
    kind = workload.training.inputs.device.type
    autocast = torch.autocast(kind, dtype=torch.bfloat16)
    return workload._replace(features=autocast(workload.features), loss=autocast(workload.loss))


PRECISIONS = ("float32", "bfloat16 autocast")

WORKLOADS: dict[str, Callable[[torch.device], Workload]] = {
    "transformer-256": lambda device: transformer(device, 256),
    "transformer-1024": lambda device: transformer(device, 1024),
    "transformer-4096": lambda device: transformer(device, 4096),
    "mlp-2": lambda device: mlp(device, 2),
    "mlp-4": lambda device: mlp(device, 4),
    "mlp-8": lambda device: mlp(device, 8),
    "mlp-16": lambda device: mlp(device, 16),
    "resnet": resnet,
}
"""By name; a number is that of tiles or of tasks."""

TINY: dict[str, Callable[[torch.device], Workload]] = {
    "tiny-transformer": lambda device: transformer(device, 4),
    "tiny-mlp": lambda device: mlp(device, 3, width=8, size=4),
    "tiny-resnet": lambda device: resnet(device, 2, 32),
}
"""The same at the smallest size, to see in seconds that a script works. Times mean nothing."""
