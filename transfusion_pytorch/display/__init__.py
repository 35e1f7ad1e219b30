"""Samples as people read them: lines on a terminal, text and pictures in a notebook, finished or while they come."""

from transfusion_pytorch.display.images import render_image
from transfusion_pytorch.display.lines import describe_sample, print_modality_sample
from transfusion_pytorch.display.live import watch
from transfusion_pytorch.display.view import SamplesView, SampleView, show_sample, show_samples

__all__ = [
    "SampleView",
    "SamplesView",
    "describe_sample",
    "print_modality_sample",
    "render_image",
    "show_sample",
    "show_samples",
    "watch",
]
