"""What trains: losses, the EMA copy, parameter groups."""
