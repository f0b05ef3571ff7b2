"""The loss of documents while a set of neurons is ablated, of any layers and in any number.

Which neurons are off is data, one number for each neuron of the model, so one program serves every set. The
text is read as `topklm.neurons.harvest` reads it: every token once, each given what stands before it in its
window; separators and padding have no loss. Dims: L layers, D neurons per layer, B rows, T tokens, G
documents.
"""

from collections.abc import Callable, Iterable, Sequence
import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec
import numpy as np

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.model.block import LayerHooks
from topklm.model.losses import token_losses
from topklm.neurons.documents import batches, pack, windows_of

Neuron = tuple[int, int]  # layer of the model, number in it

_BATCH_TOKENS = 8192  # of one device
_STRETCH_TOKENS = 2**20  # that are packed together


class AblatedLosses:
    """Documents, ready to be read again and again with other neurons off.

    "Off" is what the intervention "ablate" does: the layer's output is 0 there, at every token. It is
    computed in float32, whatever the dtype of the model, for effects of few neurons are small.

    Args:
        config: The model.
        params: Its parameters, on the devices of `mesh`.
        mesh: Rows of a batch are split over all its devices.
        documents: Token ids of each, int[n], without separators; none is empty.
        separator_id: The token that stands before documents.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: transformer.Parameters,
        mesh: Mesh,
        documents: Sequence[np.ndarray],
        *,
        separator_id: int,
    ):
        self._config, self._params = dataclasses.replace(config, dtype="float32"), params
        self._rows = max(1, _BATCH_TOKENS // config.context_length) * mesh.size
        self._batch = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        self._whole = NamedSharding(mesh, PartitionSpec())
        self.n_tokens = np.array([len(ids) for ids in documents], np.int64)
        windows = (
            window
            for number, ids in enumerate(documents)
            for window in windows_of(number, ids, separator_id, config.context_length)
        )
        self._packed = [
            pack(stretch, config.context_length, self._rows, separator_id)
            for stretch in batches(windows, _STRETCH_TOKENS)
        ]

    def sums(
        self, ablated: Iterable[Neuron] = (), report: Callable[[int], None] = lambda tokens: None
    ) -> np.ndarray:
        """Returns float64[G], nats, the sum over each document's tokens with these neurons off.

        Args:
            ablated: Neurons; none: the model as it is.
            report: Told of the tokens that are done since the last time.

        Raises:
            ValueError: For a neuron that the model does not have.
        """
        keep_LD = jax.device_put(self._keep(ablated), self._whole)
        sums = np.zeros(len(self.n_tokens))
        for packed in self._packed:
            for start in range(0, len(packed.inputs), self._rows):
                rows = slice(start, start + self._rows)
                arrays = (packed.inputs[rows], packed.segment_ids[rows], packed.positions[rows])
                with jax.default_matmul_precision("float32"):
                    nll = _forward(self._config, self._params, keep_LD, *jax.device_put(arrays, self._batch))
                places = packed.places[rows].reshape(-1)
                wanted = np.flatnonzero(places >= 0)
                # A token's own loss is found where the one before it stands; there always is one in its row.
                losses = np.asarray(nll, np.float64).reshape(-1)[wanted - 1]
                sums += np.bincount(packed.documents[places[wanted]], losses, len(sums))
                report(len(wanted))
        return sums

    def _keep(self, ablated: Iterable[Neuron]) -> np.ndarray:
        """Returns float32[L, D], 0 for neurons that are off."""
        keep = np.ones((self._config.n_layers, self._config.d_model), np.float32)
        for layer, neuron in ablated:
            if not (0 <= layer < keep.shape[0] and 0 <= neuron < keep.shape[1]):
                raise ValueError(
                    f"layer {layer}, neuron {neuron}: the model has layers 0 to {keep.shape[0] - 1} of "
                    f"{keep.shape[1]} neurons"
                )
            keep[layer, neuron] = 0
        return keep


@functools.partial(jax.jit, static_argnums=0)
def _forward(
    config: ModelConfig,
    params: transformer.Parameters,
    keep_LD: jax.Array,
    tokens_BT: jax.Array,
    segment_ids_BT: jax.Array,
    positions_BT: jax.Array,
) -> jax.Array:
    """Returns next-token losses, nats, float32[B, T]."""
    model = transformer.bind(config, params)

    def edit(h_BTD: jax.Array, keep_D: jax.Array) -> jax.Array:
        return h_BTD * keep_D.astype(h_BTD.dtype)

    h_BTD, _ = model.hidden(
        tokens_BT, segment_ids_BT, positions_BT, hooks=LayerHooks(output=edit), hook_inputs=keep_LD
    )
    return token_losses(h_BTD, model.unembedding(), jnp.roll(tokens_BT, -1, axis=1), config.vocab_size)
