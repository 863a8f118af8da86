"""Methods compared fairly: `python -m default_moe.compare`."""
