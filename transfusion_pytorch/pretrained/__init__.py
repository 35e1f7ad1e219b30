"""Models from elsewhere, as parts of a `Transfusion`: language models and autoencoders."""
