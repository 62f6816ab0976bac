"""The ways in which people change the weights of a model between two calls; many leave no trace but the values."""

from __future__ import annotations

from typing import Literal, get_args

import torch
from torch import Tensor, nn

Update = Literal[
    "data +=", "data *=", "data.copy_", "row of data", "column of data", "swap data", "foreach on data", "numpy",
    "inference mode", "vector_to_parameters", "in place", "load_state_dict", "load by assignment", "step", "replace",
    "gains and biases of data", "edit of one module",
]  # fmt: skip
UPDATES: tuple[Update, ...] = get_args(Update)


def update(how: Update, model: nn.Module, seed: int) -> None:
    """Change weights of ``model`` in the way that ``how`` names, by amounts that ``seed`` draws."""
    generator = torch.Generator().manual_seed(seed)
    weights = list(model.parameters())
    matrices = [weight for weight in weights if weight.dim() > 1]

    def noise(like: Tensor) -> Tensor:
        return 0.2 * torch.randn(like.shape, generator=generator, dtype=torch.float64).to(like.dtype)

    match how:
        case "data +=":
            for weight in matrices:
                weight.data += noise(weight)
        case "data *=":
            for weight in matrices:
                weight.data *= 1.1
        case "data.copy_":
            for weight in weights:
                weight.data.copy_(weight.data + noise(weight))
        case "row of data":
            for weight in matrices:
                weight.data[-1] = 0
        case "column of data":
            for weight in matrices:
                weight.data[:, -1] *= -1
        case "swap data":
            shadow = [weight.data + noise(weight) for weight in weights]
            for weight, other in zip(weights, shadow, strict=True):
                weight.data = other
        case "foreach on data":
            torch._foreach_mul_([weight.data for weight in matrices], 0.9)
        case "numpy":
            for weight in matrices:
                weight.detach().numpy()[...] *= 0.8
        case "inference mode":
            with torch.inference_mode():
                for weight in matrices:
                    weight.data.add_(noise(weight))
        case "vector_to_parameters":
            vector = nn.utils.parameters_to_vector(weights).detach()
            nn.utils.vector_to_parameters(vector * 1.05, weights)
        case "in place":
            with torch.no_grad():
                for weight in weights:
                    weight.add_(noise(weight))
        case "load_state_dict":
            model.load_state_dict({name: value + noise(value) for name, value in model.state_dict().items()})
        case "load by assignment":
            state = {name: value + noise(value) for name, value in model.state_dict().items()}
            model.load_state_dict(state, assign=True)
        case "step":
            for weight in weights:
                weight.grad = noise(weight)
            torch.optim.SGD(weights, lr=0.5).step()
            model.zero_grad()
        case "replace":
            for module in model.modules():
                if isinstance(module, nn.Linear):
                    module.weight = nn.Parameter(module.weight.detach() + noise(module.weight))
        case "gains and biases of data":
            for weight in weights:
                if weight.dim() < 2:
                    weight.data += noise(weight)
        case "edit of one module":
            matrices[seed % len(matrices)].data.mul_(-1)
