"""Autoencoders that a user trains: images, sound or video to latents that `Transfusion` denoises."""
