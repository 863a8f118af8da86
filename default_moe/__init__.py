"""Sparse Mixture-of-Experts language models whose router learns from every expert (Default MoE, arXiv:2504.12463).

`default_moe.load("runs/quickstart")` is a trained model to work with.
"""

from typing import Any


def __getattr__(name: str) -> Any:
    if name == "load":  # not at once: it imports nearly all there is
        from default_moe.runs.saved_run import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
