"""What a training step will take on devices that need not be there: `python -m default_moe.plan`."""
