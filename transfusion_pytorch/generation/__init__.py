"""Sampling: engine, scheduler, requests, forward passes, text sampler, denoiser."""
