"""The decoder-only language model: pre-norm attention and feed-forward blocks, most of them Mixture-of-Experts."""

import dataclasses
import functools
from typing import Any, NamedTuple

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax import Array
from jax.extend.core import ClosedJaxpr, jaxpr_as_fun
from jax.sharding import Mesh

from default_moe.config import Config, ModelConfig, MoEConfig
from default_moe.model.attention import CACHE, Attention, Tokens, residual_init_std
from default_moe.model.layer_order import STACKS, layer_groups, run_groups
from default_moe.model.norms import make_norm
from default_moe.model.splash_attention import ATTENTION_OUTPUT
from default_moe.moe import MoELayer
from default_moe.moe.default_vectors import USED_VECTORS
from default_moe.moe.experts.swiglu import EXPERT_PRODUCT
from default_moe.moe.feed_forward import FeedForward, small_init_std
from default_moe.moe.layer import DEFAULT_VECTOR_SUMS, DEFAULT_VECTORS, ROUTER_STATE, ROUTER_SUMS, ROUTING
from default_moe.sharding import constrain, num_shards, trace_annotated, unboxed, with_axes

_STATES = (
    DEFAULT_VECTORS,
    DEFAULT_VECTOR_SUMS,
    ROUTER_STATE,
    ROUTER_SUMS,
    ROUTING,
    CACHE,
)  # of a layer, beside its parameters


@flax.struct.dataclass
class LayerStats:
    """What the MoE layers report, each with a leading axis of MoE layers; see `MoELayer` for the fields.

    observed: in training, sums that the router's state moves by, by name.
    more: scalars of each layer, by name: losses of the method's own, what it keeps of one number a layer, and mean
      norms of default vectors or shares of dropped choices where there are such.
    """

    auxiliary_loss: Array
    load_balance_loss: Array
    router_z_loss: Array
    router_entropy: Array
    mean_router_probs: Array
    tokens_per_expert: Array
    num_tokens: Array
    observed: dict[str, Array]
    more: dict[str, Array]


class Unembedding(NamedTuple):
    """The two factors of the logits, in the compute dtype: the last hidden state and the output matrix."""

    x_BLD: Array
    head_DV: Array


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def look_up(table_VD: Array, tokens_BL: Array, vocab_size: int) -> Array:
    """The row of each token: [B, L, D], in the table's dtype. The table's gradient is summed in float32.

    XLA would sum it in the table's dtype: in bfloat16 the rows of frequent tokens come out wrong, since a sum of
    thousands stops growing, and slowly on GPUs, where every token adds to memory by itself.
    """
    return table_VD[tokens_BL]


def _look_up_fwd(table_VD: Array, tokens_BL: Array, vocab_size: int) -> tuple[Array, Array]:
    return table_VD[tokens_BL], tokens_BL


def _look_up_bwd(vocab_size: int, tokens_BL: Array, g_BLD: Array) -> tuple[Array, None]:
    zeros_VD = jnp.zeros((vocab_size, g_BLD.shape[-1]), jnp.float32)
    return zeros_VD.at[tokens_BL].add(g_BLD.astype(jnp.float32)).astype(g_BLD.dtype), None


look_up.defvjp(_look_up_fwd, _look_up_bwd)


class Block(nn.Module):
    """Attention, then a dense (moe=None) or Mixture-of-Experts feed-forward network, each on a normed residual."""

    config: ModelConfig
    moe: MoEConfig | None
    dense_dim: int
    train: bool
    cache_length: int | None

    @nn.compact
    def __call__(self, x_BLD: Array, tokens: Tokens) -> tuple[Array, LayerStats | None]:
        config = self.config
        x_BLD = constrain(x_BLD, "batch", None, None)
        attention = Attention(config, self.cache_length, name="attention")
        x_BLD += attention(make_norm(config, "attention_norm")(x_BLD), tokens)
        hidden_BLD = make_norm(config, "ffn_norm")(x_BLD)
        if self.moe is None:
            dense = FeedForward(self.dense_dim, jnp.dtype(config.dtype), residual_init_std(config), name="ffn")
            return x_BLD + dense(hidden_BLD), None
        moe_layer = MoELayer(self.moe, down_init_std=residual_init_std(config), name="moe")
        y_BLD, aux = moe_layer(hidden_BLD, train=self.train, mask=tokens.mask, token_ids=tokens.ids)
        aux = {"observed": {}, **aux}
        fields = {f.name: aux.pop(f.name) for f in dataclasses.fields(LayerStats) if f.name in aux}
        if "default_vector_norm" in aux:
            aux["default_vector_norm"] = aux["default_vector_norm"].mean()
        stats = LayerStats(**fields, more={name: value for name, value in aux.items() if value.ndim == 0})
        return x_BLD + y_BLD, stats


class LanguageModel(nn.Module):
    """A causal language model.

    Parameters: embed, dense_layers, moe_layers, final_norm, head (unless tied). Layers of a kind are stacked along a
    first axis in their order, wherever they are in the model, and whatever `scan_unroll` and `remat` are.
    """

    config: ModelConfig
    moe: MoEConfig
    vocab_size: int

    @nn.compact
    def __call__(
        self,
        tokens_BL: Array,
        *,
        train: bool,
        positions: Array | None = None,
        segment_ids: Array | None = None,
        mask: Array | None = None,
        cache_length: int | None = None,
        project: bool = True,
    ) -> tuple[Array | Unembedding, LayerStats | None]:
        """Predict the token after each token.

        Args:
          tokens_BL: int32 [batch, length].
          train: update the default vectors (the collection "default_vectors" must be mutable).
          positions: int32 [batch, length]; 0, 1, 2, ... if None.
          segment_ids: int32 [batch, length]; if given, attention stays within equal ids.
          mask: [batch, length], 0 for padding, which counts in no routing statistic.
          cache_length: if set, decode with a cache of that many tokens (the collection "cache" must be mutable).
          project: False returns the factors of the logits, for a loss that never holds them all.

        Returns:
          logits, float32 [batch, length, vocabulary], or their factors, and the statistics of the MoE layers (None
          without any).
        """
        config = self.config
        if positions is None:
            positions = jnp.broadcast_to(jnp.arange(tokens_BL.shape[1], dtype=jnp.int32), tokens_BL.shape)
        tokens = Tokens(positions, segment_ids, mask, tokens_BL)
        dtype = jnp.dtype(config.dtype)
        init = nn.initializers.normal(small_init_std(config.d_model))
        embedding_VD = self.param("embed", with_axes(init, "vocab", "embed"), (self.vocab_size, config.d_model))
        # Gathered whole before the look-up, like any weight split over fsdp; else activations would be split over D.
        x_BLD = look_up(constrain(embedding_VD.astype(dtype), "vocab", None), tokens_BL, self.vocab_size)
        x_BLD = constrain(x_BLD, "batch", None, None)

        x_BLD, stats = self._run_layers(x_BLD, tokens, train, cache_length)
        x_BLD = make_norm(config, "final_norm")(x_BLD)
        if config.tie_embeddings:
            kernel_DV = embedding_VD.T
        else:
            kernel_DV = self.param("head", with_axes(init, "embed", "vocab"), (config.d_model, self.vocab_size))
        unembedding = Unembedding(x_BLD.astype(dtype), kernel_DV.astype(dtype))
        if not project:
            return unembedding, stats
        return jnp.matmul(*unembedding, preferred_element_type=jnp.float32), stats

    def _run_layers(
        self, x_BLD: Array, tokens: Tokens, train: bool, cache_length: int | None
    ) -> tuple[Array, LayerStats | None]:
        config = self.config
        shared = (config.dense_dim or self.moe.expert_dim, train, cache_length)
        kinds = dict(zip(STACKS, (None, self.moe), strict=True))
        groups = layer_groups(config.num_layers, config.moe_layers)

        def make_block(name: str, in_loop: bool) -> Block:
            return _block_class(config, in_loop)(config, kinds[name], *shared, parent=None)

        if (len(groups) > 1 or groups[0].repeats > 1) and not self.is_initializing():
            return run_groups(self, groups, make_block, _STATES, config.scan_unroll, x_BLD, tokens)
        # Dense layers first. Of another order these loops make the variables, which are the same.
        stats = None
        lengths = config.num_layers - config.num_moe_layers, config.num_moe_layers
        for (name, moe), length in zip(kinds.items(), lengths, strict=True):
            if length:
                x_BLD, stats = _stack_of_blocks(config, length)(config, moe, *shared, name=name)(x_BLD, tokens)
        return x_BLD, stats


def build_model(config: Config, vocab_size: int) -> LanguageModel:
    """The model of a config, for a tokenizer of `vocab_size` entries unless model.vocab_size is set."""
    return LanguageModel(config.model, config.moe, config.model.vocab_size or vocab_size)


class TracedInit(NamedTuple):
    """How a model's variables are made: computed from a random key, and their shapes, boxed with names of axes."""

    computed: ClosedJaxpr
    boxed_shapes: Any

    def make(self, key: Array) -> dict[str, Any]:
        """Return the variables: what `model.init` gives, without tracing the model again."""
        structure = jax.tree.structure(unboxed(self.boxed_shapes))
        return dict(jax.tree.unflatten(structure, jaxpr_as_fun(self.computed)(key)))


def traced_init(model: LanguageModel) -> TracedInit:
    """Trace a model's initial variables, once for each model and mesh. To be called outside of jit."""
    return _traced_init(model, jax.sharding.get_mesh())


@functools.cache
def _traced_init(model: LanguageModel, mesh: Mesh) -> TracedInit:
    def init(key: Array) -> Any:
        tokens_BL = jnp.zeros((num_shards("batch"), 2), jnp.int32)  # a row for each device that has a part of a batch
        return model.init(key, tokens_BL, train=False)

    # Of the key only its shape: devices of a plan are not there to hold one.
    return TracedInit(*trace_annotated(init, jax.eval_shape(lambda: jax.random.key(0))))


def _stack_of_blocks(config: ModelConfig, length: int) -> Any:
    """A Block class that runs `length` blocks in a scan."""
    return nn.scan(
        _block_class(config, in_loop=True),
        variable_axes=dict.fromkeys(("params", "intermediates", *_STATES), 0),
        split_rngs={"params": True, "router": True},
        in_axes=nn.broadcast,
        length=length,
        unroll=config.scan_unroll,
        metadata_params={nn.PARTITION_NAME: None},
    )


def _block_class(config: ModelConfig, in_loop: bool) -> Any:
    """Block, or one whose backward pass recomputes what `remat` says.

    in_loop: else XLA would find that it has been computed before, and keep that.
    """
    if config.remat == "none":
        return Block
    policies = jax.checkpoint_policies
    products = policies.save_from_both_policies(
        policies.dots_with_no_batch_dims_saveable,
        policies.save_only_these_names(EXPERT_PRODUCT, USED_VECTORS, ATTENTION_OUTPUT),
    )
    policy = products if config.remat == "dots" else None
    return nn.remat(Block, prevent_cse=not in_loop, policy=policy)
