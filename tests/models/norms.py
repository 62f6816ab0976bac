"""The norms of real models, each in the spelling its authors use.

Upcasts go to "at least float32", so that a float64 model keeps its precision and the graph keeps its cast.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.models.spec import Norm


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


class HFRMSNorm(nn.Module):
    """Llama's: normalise in float32, cast back, then the gain."""

    def __init__(self, width: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.variance_epsilon = eps

    def forward(self, hidden: Tensor) -> Tensor:
        input_dtype = hidden.dtype
        hidden = hidden.to(at_least_float32(input_dtype))
        variance = hidden.pow(2).mean(-1, keepdim=True)
        hidden = hidden * torch.rsqrt(variance + self.variance_epsilon)
        return self.weight * hidden.to(input_dtype)


class GainAfterCastRMSNorm(HFRMSNorm):
    """The gain is applied in float32 and the product is cast (OLMo2's order)."""

    def forward(self, hidden: Tensor) -> Tensor:
        x = hidden.to(at_least_float32(hidden.dtype))
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (self.weight * x).to(hidden.dtype)


class GainPlusOneRMSNorm(HFRMSNorm):
    """Gemma's: the gain is 1 + weight, in float32."""

    def forward(self, hidden: Tensor) -> Tensor:
        wide = at_least_float32(hidden.dtype)
        x = hidden.to(wide)
        x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return (x * (1.0 + self.weight.to(wide))).type_as(hidden)


class FunctionalRMSNorm(HFRMSNorm):
    def forward(self, hidden: Tensor) -> Tensor:
        return F.rms_norm(hidden, (hidden.shape[-1],), self.weight.to(hidden.dtype), self.variance_epsilon)


class RsqrtRMSNorm(HFRMSNorm):
    """No casts, mean(x * x), the gain last."""

    def forward(self, hidden: Tensor) -> Tensor:
        variance = torch.mean(hidden * hidden, dim=-1, keepdim=True)
        return hidden * torch.rsqrt(variance + self.variance_epsilon) * self.weight


class SqrtRMSNorm(HFRMSNorm):
    """x / sqrt(mean(x ** 2) + eps)."""

    def forward(self, hidden: Tensor) -> Tensor:
        return self.weight * (hidden / torch.sqrt((hidden**2).mean(-1, keepdim=True) + self.variance_epsilon))


class ParameterlessRMSNorm(nn.Module):
    def __init__(self, eps: float) -> None:
        super().__init__()
        self.eps = eps

    def forward(self, hidden: Tensor) -> Tensor:
        return hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.eps)


def make_norm(spec: Norm, width: int) -> nn.Module:
    match spec.kind:
        case "rms_hf":
            return HFRMSNorm(width, spec.eps)
        case "rms_gain_after_cast":
            return GainAfterCastRMSNorm(width, spec.eps)
        case "rms_gain_plus_one":
            return GainPlusOneRMSNorm(width, spec.eps)
        case "rms_functional":
            return FunctionalRMSNorm(width, spec.eps)
        case "rms_rsqrt":
            return RsqrtRMSNorm(width, spec.eps)
        case "rms_sqrt":
            return SqrtRMSNorm(width, spec.eps)
        case "rms_parameterless":
            return ParameterlessRMSNorm(spec.eps)
        case "rms_module":
            return nn.RMSNorm(width, eps=spec.eps)
        case "layer_norm":
            return nn.LayerNorm(width, eps=spec.eps)
        case "layer_norm_no_bias":
            return nn.LayerNorm(width, eps=spec.eps, bias=False)
        case "layer_norm_parameterless":
            return nn.LayerNorm(width, eps=spec.eps, elementwise_affine=False)
        case "none":
            return nn.Identity()
