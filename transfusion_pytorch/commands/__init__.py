"""What is run from a shell: `python -m transfusion_pytorch COMMAND`, and what the scripts have in common with it."""
