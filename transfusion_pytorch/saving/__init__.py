"""Models and runs on disk: safetensors and JSON, never pickle."""
