"""What belongs to the modalities: autoencoders, shapes, adapters, and their latents in a batch."""
