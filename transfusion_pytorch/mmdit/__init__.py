"""Multimodal diffusion transformers (MMDiT): every modality its own weights, one attention over all tokens."""

from transfusion_pytorch.mmdit.attention import JointAttention
from transfusion_pytorch.mmdit.blocks import InContextMMDiTBlock, MMDiTBlock
from transfusion_pytorch.mmdit.layers import (
    AdaptiveLayerNorm,
    FeedForward,
    ModulatedFinalLayer,
    SimpleFinalLayer,
    TimestepEmbedding,
)
from transfusion_pytorch.mmdit.masks import imitation_mask
from transfusion_pytorch.mmdit.model import InContextMMDiT, MMDiT
from transfusion_pytorch.mmdit.sd3 import SD3MMDiT
from transfusion_pytorch.mmdit.trunk import Context

__all__ = [
    "AdaptiveLayerNorm",
    "Context",
    "FeedForward",
    "InContextMMDiT",
    "InContextMMDiTBlock",
    "JointAttention",
    "MMDiT",
    "MMDiTBlock",
    "ModulatedFinalLayer",
    "SD3MMDiT",
    "SimpleFinalLayer",
    "TimestepEmbedding",
    "imitation_mask",
]
