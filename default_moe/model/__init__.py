"""The language model around the MoE layers."""
