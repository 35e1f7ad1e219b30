"""One transformer that writes text and draws: autoregression and flow matching, mixed freely.

`TYPECHECK=1` in the environment checks the shapes and types of every call at run time.
"""

import os
from importlib.metadata import version

if os.environ.get("TYPECHECK", "").lower() in ("1", "true"):
    from jaxtyping import install_import_hook

    import transfusion_pytorch.typecheck  # noqa: F401 - the hook finds it by name

    install_import_hook("transfusion_pytorch", "transfusion_pytorch.typecheck.check")

from transfusion_pytorch.display import print_modality_sample, render_image, show_sample, show_samples, watch
from transfusion_pytorch.flow.path import slerp
from transfusion_pytorch.flow.times import TimePolicy
from transfusion_pytorch.generation.engine import Engine, EngineStats, Request
from transfusion_pytorch.generation.events import (
    DrawingProgress,
    Ended,
    EndReason,
    ModalityDone,
    ModalityStarted,
    TextToken,
)
from transfusion_pytorch.generation.options import SamplingOptions
from transfusion_pytorch.modalities.unet import UNetDown, UNetUp
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.saving.card import ModelCard
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Condition, Latents, Sample
from transfusion_pytorch.training.data import collate_fn, create_dataloader
from transfusion_pytorch.training.ema import create_ema
from transfusion_pytorch.training.losses import LossBreakdown, SpanLosses
from transfusion_pytorch.transfusion import Transfusion

__version__ = version("transfusion-pytorch")

__all__ = [
    "Batch",
    "Condition",
    "DrawingProgress",
    "EndReason",
    "Ended",
    "Engine",
    "EngineStats",
    "Latents",
    "LossBreakdown",
    "ModalityDone",
    "ModalityStarted",
    "ModelCard",
    "Packer",
    "Request",
    "Sample",
    "SamplingOptions",
    "SpanLosses",
    "TargetCounts",
    "TextToken",
    "TimePolicy",
    "Transformer",
    "Transfusion",
    "UNetDown",
    "UNetUp",
    "collate_fn",
    "create_dataloader",
    "create_ema",
    "plain_formulas",
    "print_modality_sample",
    "register_component",
    "render_image",
    "show_sample",
    "show_samples",
    "slerp",
    "watch",
]
