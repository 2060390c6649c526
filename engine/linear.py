"""Linear layers of a model whose products in float32 on a CPU are oneDNN's; everywhere else they are torch's own."""

from __future__ import annotations

from torch import Tensor, nn

from twinhead.kernels.product import linear


class Linear(nn.Linear):
    """nn.Linear by another product: a layer that changes its class keeps its weights, its name and its hooks."""

    def forward(self, input: Tensor) -> Tensor:
        """(..., K) -> (..., N)."""
        return linear(input, self.weight, self.bias)


def adopt(model: nn.Module) -> None:
    """Let every plain linear layer of `model` multiply so."""
    for module in model.modules():
        if type(module) is nn.Linear:
            module.__class__ = Linear
