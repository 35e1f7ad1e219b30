"""What denoises: the path from noise to data, its times, the solver, and guidance."""
