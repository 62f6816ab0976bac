"""The nets of the zoo, by name: every causal language model of transformers, and nets of other people's making."""

from __future__ import annotations

import importlib
import importlib.util
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import Tensor, nn

from tests.models import well_known
from tests.zoo.configs import HEADS, LAYERS, VOCABULARY, WIDTH, tiny

GIVEN: Mapping[str, Mapping[str, Any]] = {
    # The defaults of these classes make no model, or none of six layers, whatever the sizes.
    "CohereCompassForCausalLM": {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
    "CsmDepthDecoderForCausalLM": {"num_codebooks": 16},  # one for each place of the sequence
    "DbrxForCausalLM": {"attn_config": {"kv_n_heads": 2, "rope_theta": 1e4, "clip_qkv": 8.0}},
    "GPTNeoForCausalLM": {"attention_types": [[["global", "local"], 3]]},
    "Lfm2MoeForCausalLM": {"layer_types": ["conv", "full_attention"] * 3},
    "Qwen4ExpForCausalLM": {"indexer_kv_heads": 1, "indexer_budget": 8, "indexer_compress_ratio": 2},
    "ReformerModelWithLMHead": {"axial_pos_embds": False},
    "XmodForCausalLM": {"default_language": "en_XX"},
    "ZambaForCausalLM": {"attn_layer_period": 3, "attn_layer_offset": 1},
    "Zamba2ForCausalLM": {"layers_block_type": ["linear_attention", "hybrid", "linear_attention"] * 2},
}


@dataclass(frozen=True)
class Net:
    """A model in float64 with random weights, and what to call it with."""

    model: nn.Module
    inputs: Mapping[str, Tensor]

    def single(self) -> Net:
        """The same in float32. Its model is the very one, converted."""
        inputs = {name: given.float() if given.is_floating_point() else given for name, given in self.inputs.items()}
        return Net(self.model.float(), inputs)


@dataclass(frozen=True)
class Entry:
    """One net of the zoo.

    Attributes:
        name: the class.
        origin: the package that it comes from.
        build: makes it; may raise anything.
    """

    name: str
    origin: str
    build: Callable[[], Net]


@contextmanager
def by_default(dtype: torch.dtype) -> Iterator[None]:
    """Nets are built and called with their dtype as the default one, because they make some constants in it."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def entries() -> dict[str, Entry]:
    """All nets, by name. Reads the sources of transformers and imports nothing of them."""
    causal = [Entry(name, "transformers", _causal(name, module)) for name, module in _causal_classes().items()]
    others = [
        Entry("ModernBertModel", "transformers", _modern_bert),
        Entry("Dinov2Model (SwiGLU)", "transformers", _dinov2),
        *(
            Entry(kind.__name__, "by hand", _handmade(kind))
            for kind in (well_known.NanoGPT, well_known.TorchtuneDecoder)
        ),
    ]
    return {entry.name: entry for entry in [*causal, *others, *_timm()]}


def _timm() -> list[Entry]:
    """Vision transformers of timm with SwiGLU, where timm is installed."""
    if importlib.util.find_spec("timm") is None:
        return []
    try:
        importlib.import_module("torchvision")
    except RuntimeError:
        # PyPI has it built for CUDA. Beside a torch for CPUs its import asks for two ops that it could not load.
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
    from timm.layers import SwiGLUPacked
    from timm.models.eva import Eva
    from timm.models.vision_transformer import VisionTransformer

    sizes = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": LAYERS, "num_heads": HEADS, "num_classes": 0}
    kinds: dict[str, Callable[[], nn.Module]] = {
        "Eva (SwiGLU)": lambda: Eva(**sizes, swiglu_mlp=True, use_rot_pos_emb=True, scale_mlp=False),
        "Eva (SwiGLU, sub-norm)": lambda: Eva(**sizes, swiglu_mlp=True, use_rot_pos_emb=True, scale_mlp=True),
        "VisionTransformer (packed SwiGLU)": lambda: VisionTransformer(
            **sizes, mlp_layer=SwiGLUPacked, act_layer=nn.SiLU, init_values=1e-5, reg_tokens=4
        ),
    }
    return [Entry(name, "timm", _pictures(kind)) for name, kind in kinds.items()]


def _causal_classes() -> dict[str, str]:
    """The module of each causal language model: what is named ``*ForCausalLM``, and what the auto class lists."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as LISTED

    listed = {name for names in LISTED.values() for name in ([names] if isinstance(names, str) else names)}
    found: dict[str, str] = {}
    for path in sorted((Path(transformers.__file__).parent / "models").glob("*/modeling_*.py")):
        for name in re.findall(r"^class (\w+)\(", path.read_text(), re.MULTILINE):
            if (name.endswith("ForCausalLM") and not name.startswith("AutoModel")) or (
                name in listed and not name.endswith("ForConditionalGeneration")
            ):
                found[name] = f"transformers.models.{path.parent.name}.{path.stem}"
    return dict(sorted(found.items(), key=lambda item: item[0].lower()))


def _causal(name: str, module: str) -> Callable[[], Net]:
    def build() -> Net:
        kind = getattr(importlib.import_module(module), name)
        inputs = {"input_ids": torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))}
        try:
            return _runnable(kind, inputs, False, GIVEN.get(name, {}))
        except Exception:
            return _runnable(kind, inputs, True, GIVEN.get(name, {}))

    return build


def _runnable(kind: Any, inputs: Mapping[str, Tensor], fill: bool, given: Mapping[str, Any]) -> Net:
    config = tiny(kind.config_class, fill, **given)
    config.use_cache = False
    config.is_decoder = True
    config._experts_implementation = "batched_mm"  # of one graph, and of any dtype
    net = Net(_seeded(lambda: kind(config)), inputs)
    with torch.no_grad():
        net.model(**net.inputs)
    return net


def _modern_bert() -> Net:
    config = tiny(transformers.ModernBertConfig)
    model = _seeded(lambda: transformers.ModernBertModel(config))
    return Net(model, {"input_ids": torch.arange(3, 19).view(2, 8)})


def _dinov2() -> Net:
    config = tiny(transformers.Dinov2Config, use_swiglu_ffn=True)
    return _pictures(lambda: transformers.Dinov2Model(config), "pixel_values")()


def _pictures(kind: Callable[[], nn.Module], name: str = "x") -> Callable[[], Net]:
    pixels = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return lambda: Net(_seeded(kind), {name: pixels})


def _handmade(kind: Callable[[], nn.Module]) -> Callable[[], Net]:
    return lambda: Net(_seeded(kind), {"tokens": torch.arange(3, 19).view(2, 8)})


def _seeded(make: Callable[[], nn.Module]) -> nn.Module:
    """A model in float64 whose matrices are large enough to matter, and whose vectors are not 0 and 1."""
    torch.manual_seed(0)
    model = make().double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            values = torch.randn(parameter.shape, generator=generator, dtype=torch.float64).to(parameter.dtype)
            if parameter.dim() < 2:
                parameter.add_(values * 0.1)  # gains stay near 1, and what is the logarithm of a rate keeps its size
            else:
                parameter.copy_(values / parameter.shape[-1] ** 0.5)
    return model
