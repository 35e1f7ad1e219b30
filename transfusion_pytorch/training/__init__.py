"""What trains: losses, data loading, the EMA copy, parameter groups."""
