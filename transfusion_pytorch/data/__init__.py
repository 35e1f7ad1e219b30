"""Data: which samples every step sees, how they are loaded, and ready datasets of images, captions and text."""

from transfusion_pytorch.data.captioned import CaptionedImages
from transfusion_pytorch.data.hub import CaptionedRow, HuggingFaceImages
from transfusion_pytorch.data.image_files import ImageFiles
from transfusion_pytorch.data.images import BucketedSize, FixedSize, ImageReader, NativeSize
from transfusion_pytorch.data.latents import CachedLatents, cache_latents
from transfusion_pytorch.data.loader import LoadedStep, StepLoader
from transfusion_pytorch.data.loading import SampleError, Skipped, SkipSample, collate_fn, create_dataloader
from transfusion_pytorch.data.mixture import Mixture
from transfusion_pytorch.data.order import SampleReference, generator_of, seed_of
from transfusion_pytorch.data.pairs import ImageCaptionPairs, Selection, hold_out
from transfusion_pytorch.data.plan import DataPlan, StepPlan
from transfusion_pytorch.data.stream import StreamLoader
from transfusion_pytorch.data.tars import WebDatasetTars
from transfusion_pytorch.data.text import ByteText, TextCodec, TextWindows, TokenizerText, train_bpe
from transfusion_pytorch.modalities.patches import patchify, unpatchify

__all__ = [
    "BucketedSize",
    "ByteText",
    "CachedLatents",
    "CaptionedImages",
    "CaptionedRow",
    "DataPlan",
    "FixedSize",
    "HuggingFaceImages",
    "ImageCaptionPairs",
    "ImageFiles",
    "ImageReader",
    "LoadedStep",
    "Mixture",
    "NativeSize",
    "SampleError",
    "SampleReference",
    "Selection",
    "SkipSample",
    "Skipped",
    "StepLoader",
    "StepPlan",
    "StreamLoader",
    "TextCodec",
    "TextWindows",
    "TokenizerText",
    "WebDatasetTars",
    "cache_latents",
    "collate_fn",
    "create_dataloader",
    "generator_of",
    "hold_out",
    "patchify",
    "seed_of",
    "train_bpe",
    "unpatchify",
]
