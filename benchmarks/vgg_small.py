"""VGG-small with the paper's normalisation: the network of benchmarks/paper_vgg.py.

Six 3x3 convolutions (128, 128, 256, 256, 512, 512), halved after every second one, and a linear
layer; no biases, and batch norm without affine after every layer, so that the scale of a weight
tensor decides nothing: weights of -s and +s compute what -1 and +1 do. A step of AdamW, whose
length is the rate, is another share of s than of 1, though: published rates do not carry over.
"""

from torch import nn


def vgg_small() -> nn.Module:
    """Return the network with arbitrary weights; logits of ten classes for [batch, 3, 32, 32]."""
    layers: list[nn.Module] = []
    inputs = 3
    for i, width in enumerate((128, 128, 256, 256, 512, 512)):
        layers.append(nn.Conv2d(inputs, width, 3, padding=1, bias=False))
        layers += [nn.MaxPool2d(2)] if i % 2 else []
        layers += [nn.BatchNorm2d(width, affine=False), nn.ReLU()]
        inputs = width
    layers += [nn.Flatten(), nn.Linear(inputs * 4 * 4, 10, bias=False)]
    return nn.Sequential(*layers, nn.BatchNorm1d(10, affine=False))
