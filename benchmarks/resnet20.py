"""ResNet-20 for CIFAR-10 (He et al. 2016, section 4.2), as a user would write a module of theirs.

Three stages of three blocks with 16, 32 and 64 channels; the shortcuts between stages have no
parameters (option A: every second pixel, zeros for the new channels). Used as
``askewq finetune --model benchmarks/resnet20.py:resnet20 --weights W.safetensors ...``.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812  # torch's own habit


class Block(nn.Module):
    """Two 3x3 convolutions around a parameter-free shortcut."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride = stride
        self.added = (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        """Map [batch, inputs, h, w] to [batch, outputs, h / stride, w / stride]."""
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(shortcut, (0, 0, 0, 0, self.added, self.added)))


class ResNet20(nn.Module):
    """The network; logits of ten classes for [batch, 3, 32, 32]."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = nn.Sequential(Block(16, 16, 1), Block(16, 16, 1), Block(16, 16, 1))
        self.layer2 = nn.Sequential(Block(16, 32, 2), Block(32, 32, 1), Block(32, 32, 1))
        self.layer3 = nn.Sequential(Block(32, 64, 2), Block(64, 64, 1), Block(64, 64, 1))
        self.linear: nn.Module = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits [batch, 10]."""
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        logits: Tensor = self.linear(torch.mean(x, dim=(2, 3)))
        return logits


def resnet20() -> nn.Module:
    """Return the network with arbitrary weights."""
    return ResNet20()


def encoder() -> nn.Module:
    """Return it without its head: embeddings [batch, 64]."""
    network = ResNet20()
    network.linear = nn.Identity()
    return network
