"""Facts of one neuron from a run's folder, where it has been harvested and measured."""

import dataclasses
import importlib.util

from topklm.inference.language_model import LanguageModel
from topklm.neurons.dictionary import check_coordinates
from topklm.neurons.paths import NeuronsFolder
from topklm.neurons.store import Store
from topklm.steering import concepts as concepts_lib
from topklm.steering.concepts import Concept, ConceptReader


@dataclasses.dataclass(frozen=True)
class NeuronFacts:
    """Of one neuron.

    Attributes:
        n_active: Tokens at which it is active.
        n_tokens: On which it was measured.
        max_activation: None for a dead neuron.
        input_tokens: That make up most of its activation, the first most.
        raised_tokens: That it raises most by the averaged Jacobian lens.
    """

    n_active: int
    n_tokens: int
    max_activation: float | None
    input_tokens: tuple[int, ...]
    raised_tokens: tuple[int, ...]


def read(folder: NeuronsFolder, layer: int, neuron: int) -> NeuronFacts | None:
    """Reads what is known; None if the layer was not measured, or the extra that reads it is not installed.

    Raises:
        UserError: If the file is damaged, or was measured on another store than lies beside it.
    """
    if not folder.table.exists() or importlib.util.find_spec("pyarrow") is None:
        return None
    # Parquet needs a package of the extra.
    from topklm.neurons.statistics import table  # noqa: PLC0415

    rows, measured = table.read(folder.table)
    if folder.store.exists():
        table.check_same(folder.table, measured, Store(folder.store))
    check_coordinates(measured.dictionary, "steer")
    if layer not in measured.layers:
        return None
    # Sorted by layer and neuron.
    place = measured.layers.index(layer) * measured.d_model + neuron
    row = rows.slice(place, 1).to_pylist()[0]
    return NeuronFacts(
        row["n_active"],
        measured.n_tokens,
        row["max_activation"],
        tuple(row["top_tokens"] or ()),
        tuple(row["jacobian_top"] or ()),
    )


def own_concepts(
    model: LanguageModel, folder: NeuronsFolder | None, facts: NeuronFacts | None, layer: int, neuron: int
) -> list[Concept]:
    """Returns the neuron's own tokens, of each kind that there is something to read from.

    "input", its top input tokens, if it has been measured; "next", the tokens that follow it more than they
    do elsewhere (`concepts`), if it has been harvested; "raised", those that it raises most, by the
    averaged Jacobian lens if it has been measured, else by the identity lens, which the parameters suffice
    for. Only the last kind says what the neuron does by construction: it is no evidence that steering works.

    Args:
        model: The model.
        folder: Where its activations are; None: nowhere.
        facts: From `read`.
        layer: Of the neuron.
        neuron: Its number.
    """
    tokenizer, found = model.tokenizer, []
    if facts is not None and facts.input_tokens:
        source = f"its top input tokens on {facts.n_tokens:,} measured tokens"
        found.append(concepts_lib.of_tokens("input", source, facts.input_tokens, tokenizer))
    following = _following(model, folder, layer, neuron)
    if following:
        source = "the tokens that follow it more than they do elsewhere in the harvested text"
        found.append(concepts_lib.of_tokens("next", source, following, tokenizer))
    if facts is not None and facts.raised_tokens:
        source = "the tokens that it raises most by the averaged Jacobian lens"
        return [*found, concepts_lib.of_tokens("raised", source, facts.raised_tokens, tokenizer)]
    raised = concepts_lib.raised_tokens(model.config.model, model.params, neuron).tolist()
    source = "the tokens that it raises most by the identity lens (it has not been measured)"
    return [*found, concepts_lib.of_tokens("raised", source, raised, tokenizer)]


def _following(model: LanguageModel, folder: NeuronsFolder | None, layer: int, neuron: int) -> list[int]:
    if folder is None or not folder.store.exists():
        return []
    store = Store(folder.store)
    metadata = store.metadata
    if metadata.tokenizer_sha256 != model.tokenizer.sha256 or layer not in metadata.layers:
        return []
    found = ConceptReader(store, model.config.model.vocab_size).read(layer, [neuron])
    if not len(found.neurons):
        return []
    return concepts_lib.token_sets(found, "next")[0].tolist()
