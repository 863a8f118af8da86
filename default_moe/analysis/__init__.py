"""What a trained router is like: `python -m default_moe.analysis`."""
