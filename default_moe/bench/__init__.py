"""Benchmarks that anyone can run: `python -m default_moe.bench --suite=layer` or `--suite=step`."""
