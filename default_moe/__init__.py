"""Sparse Mixture-of-Experts language models whose router learns from every expert (Default MoE, arXiv:2504.12463)."""
