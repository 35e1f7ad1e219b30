"""What samples: token sampling, the shape grammar, and the engine."""
