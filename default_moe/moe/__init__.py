"""The Mixture-of-Experts layer. Its idea is in `default_vectors.py`, its modules are in `layer.py`."""

from default_moe.moe.layer import MoELayer as MoELayer
from default_moe.moe.layer import next_router_state as next_router_state
