"""A model of nothing but FFNs, with the same in parallel form, by its own modules."""

from __future__ import annotations

from torch import Tensor, nn

from tests.models.bodies import SwiGLU


class Layer(nn.Module):
    """``h + mlp(norm(h))``."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.norm, self.mlp = nn.RMSNorm(width, eps=1e-6), SwiGLU(hidden, width=width)

    def forward(self, h: Tensor) -> Tensor:
        return h + self.mlp(self.norm(h))


class FFNs(nn.Module):
    """Three FFNs in a row."""

    def __init__(self, width: int = 8, hidden: int = 12) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Layer(width, hidden) for _ in range(3))

    def forward(self, h: Tensor) -> Tensor:
        for layer in self.layers:
            h = layer(h)
        return h

    def parallel(self, h: Tensor) -> Tensor:
        """What the model is to compute where its first two FFNs read one point."""
        one, two, last = (layer for layer in self.layers if isinstance(layer, Layer))
        made: Tensor = last(h + one.mlp(one.norm(h)) + two.mlp(two.norm(h)))
        return made
