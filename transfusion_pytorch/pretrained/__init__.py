"""Pretrained models from elsewhere: language models and autoencoders."""
