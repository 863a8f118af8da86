"""The Mixture-of-Experts layer. Its idea is in `default_vectors.py`, its modules are in `layer.py`."""

from default_moe.moe.layer import MoELayer as MoELayer
