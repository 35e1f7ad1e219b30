"""What computes: attention, norms, the transformer, and the adapters around it. Knows no vocabulary."""
