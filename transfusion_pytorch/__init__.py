"""One transformer that writes text and draws: autoregression and flow matching, mixed freely.

`TYPECHECK=1` in the environment checks the shapes and types of every call at run time.
"""

import os
from importlib.metadata import version

if os.environ.get("TYPECHECK", "").lower() in ("1", "true"):
    from jaxtyping import install_import_hook

    import transfusion_pytorch.typecheck  # noqa: F401 - the hook finds it by name

    install_import_hook("transfusion_pytorch", "transfusion_pytorch.typecheck.check")

from transfusion_pytorch.autoencoder.model import KLAutoencoder, KLDecoder, KLEncoder
from transfusion_pytorch.autoencoder.objective import AutoencoderObjective
from transfusion_pytorch.autoencoder.trainer import AutoencoderTrainer
from transfusion_pytorch.data import (
    ByteText,
    CaptionedImages,
    DataPlan,
    ImageFiles,
    ImageReader,
    LoadedStep,
    Mixture,
    SampleError,
    SampleReference,
    SkipSample,
    StepLoader,
    StreamLoader,
    TokenizerText,
    cache_latents,
    collate_fn,
    create_dataloader,
    train_bpe,
)
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
from transfusion_pytorch.mmdit import InContextMMDiT, MMDiT, SD3MMDiT
from transfusion_pytorch.modalities.patches import PatchDecoder, PatchEncoder
from transfusion_pytorch.modalities.unet import UNetDown, UNetUp
from transfusion_pytorch.network.shortcuts import plain_formulas
from transfusion_pytorch.network.transformer import Transformer
from transfusion_pytorch.pretrained.autoencoders import pretrained_autoencoder
from transfusion_pytorch.pretrained.language_model import language_model_dim
from transfusion_pytorch.pretrained.vision import VisionEncoder, pretrained_vision_encoder
from transfusion_pytorch.saving.card import ModelCard
from transfusion_pytorch.saving.components import register_component
from transfusion_pytorch.sequence.batch import Batch
from transfusion_pytorch.sequence.counts import TargetCounts
from transfusion_pytorch.sequence.packer import Packer
from transfusion_pytorch.sequence.samples import Condition, Latents, Sample, WithCleanCopy
from transfusion_pytorch.serving import AsyncEngine
from transfusion_pytorch.training.callbacks import Callback
from transfusion_pytorch.training.checkpoint import Checkpoints
from transfusion_pytorch.training.config import TrainConfig
from transfusion_pytorch.training.ema import create_ema
from transfusion_pytorch.training.losses import LossBreakdown, SpanLosses
from transfusion_pytorch.training.random_states import random_states, set_random_states
from transfusion_pytorch.training.representation import SelfMaskedRepTraining
from transfusion_pytorch.training.trainer import Fitted, Trainer, TrainingError
from transfusion_pytorch.transfusion import Transfusion

__version__ = version("transfusion-pytorch")

__all__ = [
    "AsyncEngine",
    "AutoencoderObjective",
    "AutoencoderTrainer",
    "Batch",
    "ByteText",
    "Callback",
    "CaptionedImages",
    "Checkpoints",
    "Condition",
    "DataPlan",
    "DrawingProgress",
    "EndReason",
    "Ended",
    "Engine",
    "EngineStats",
    "Fitted",
    "ImageFiles",
    "ImageReader",
    "InContextMMDiT",
    "KLAutoencoder",
    "KLDecoder",
    "KLEncoder",
    "Latents",
    "LoadedStep",
    "LossBreakdown",
    "MMDiT",
    "Mixture",
    "ModalityDone",
    "ModalityStarted",
    "ModelCard",
    "Packer",
    "PatchDecoder",
    "PatchEncoder",
    "Request",
    "SD3MMDiT",
    "Sample",
    "SampleError",
    "SampleReference",
    "SamplingOptions",
    "SelfMaskedRepTraining",
    "SkipSample",
    "SpanLosses",
    "StepLoader",
    "StreamLoader",
    "TargetCounts",
    "TextToken",
    "TimePolicy",
    "TokenizerText",
    "TrainConfig",
    "Trainer",
    "TrainingError",
    "Transformer",
    "Transfusion",
    "UNetDown",
    "UNetUp",
    "VisionEncoder",
    "WithCleanCopy",
    "cache_latents",
    "collate_fn",
    "create_dataloader",
    "create_ema",
    "language_model_dim",
    "plain_formulas",
    "pretrained_autoencoder",
    "pretrained_vision_encoder",
    "print_modality_sample",
    "random_states",
    "register_component",
    "render_image",
    "set_random_states",
    "show_sample",
    "show_samples",
    "slerp",
    "train_bpe",
    "watch",
]
