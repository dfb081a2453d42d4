"""What the tests of the gates between two streams share: odd weights, and the layers' equations on (positions..., C)."""

from __future__ import annotations

import torch
from torch import nn

C = 8
EXACT = {"rtol": 0, "atol": 1e-12}


def with_odd_norms(part, train):
    """In float64, with norms that no constructor gives."""
    part.double()
    for module in part.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(std=0.3)
            module.running_var.uniform_(0.5, 2)
        if isinstance(module, nn.BatchNorm2d | nn.LayerNorm):
            nn.init.normal_(module.weight, 1, 0.3)
            nn.init.normal_(module.bias, 0, 0.3)
    return part.train(train)


def sigmoid(x):
    return 1 / (1 + torch.exp(-x))


def silu(x):
    return x * sigmoid(x)


def mapped(layer, x):
    y = x @ layer.weight.reshape(layer.weight.shape[0], -1).T
    return y if layer.bias is None else y + layer.bias


def normed(layer, x, train):
    if isinstance(layer, nn.LayerNorm):
        mean, var = x.mean(-1, keepdim=True), ((x - x.mean(-1, keepdim=True)) ** 2).mean(-1, keepdim=True)
    elif train:
        flat = x.reshape(-1, x.shape[-1])
        mean, var = flat.mean(0), ((flat - flat.mean(0)) ** 2).mean(0)
    else:
        mean, var = layer.running_mean, layer.running_var
    return (x - mean) / torch.sqrt(var + layer.eps) * layer.weight + layer.bias
