"""Data: which samples every step sees, how they are loaded, and ready datasets of images, captions and text."""
