"""Expert-router coupling (ERC, arXiv:2512.23447): the router is told about all experts' weights, without tokens.

Column i of the router's matrix, with a little noise, is a proxy for the tokens that expert i is chosen for. This
follows the paper's abstract; the kind of noise and its size are choices of ours.
"""

import jax
import jax.numpy as jnp
from jax import Array

from default_moe.sharding import constrain

NOISE = 0.1


def proxy_noise(key: Array, shape_DN: tuple[int, int]) -> Array:
    """Factors of the proxies' entries, uniform in [1 - NOISE, 1 + NOISE]."""
    return jax.random.uniform(key, shape_DN, jnp.float32, 1 - NOISE, 1 + NOISE)


def coupling_loss(proxies_DN: Array, gate_NDF: Array, margin: float) -> Array:
    """Mean over i != j of relu(M_ij - a M_ii) + relu(M_ji - a M_ii), with a the margin.

    M_ij is the norm of silu(gate_j r_i), how strongly expert j answers proxy i: its own expert should answer it more
    than others do, and the expert should answer its own proxy more than others.

    gate_NDF: of the experts, in the compute dtype, split over devices or not.
    """
    proxies_DN = proxies_DN.astype(gate_NDF.dtype)
    product_NMF = jnp.einsum("dn,mdf->nmf", proxies_DN, gate_NDF, preferred_element_type=jnp.float32)
    square_NM = jnp.square(jax.nn.silu(constrain(product_NMF, None, "expert", None))).sum(axis=-1)
    norm_NM = jnp.where(square_NM > 0, jnp.sqrt(jnp.where(square_NM > 0, square_NM, 1.0)), 0.0)  # at 0 without slope
    norm_NM = constrain(norm_NM, None, None)
    own_N1 = margin * jnp.diagonal(norm_NM)[:, None]
    excess_NM = jax.nn.relu(norm_NM - own_N1) + jax.nn.relu(norm_NM.T - own_N1)
    num_experts = norm_NM.shape[0]
    others_NM = ~jnp.eye(num_experts, dtype=bool)
    return jnp.where(others_NM, excess_NM, 0).sum() / max(num_experts * (num_experts - 1), 1)
