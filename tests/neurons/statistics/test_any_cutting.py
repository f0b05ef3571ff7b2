"""The same figures however neurons are cut into blocks and text into segments; and they fit the table."""

from activity_stores import make_store, random_dense
import numpy as np
import pyarrow as pa
import pytest

from topklm.neurons.statistics import activity, embeddings, selectivity
from topklm.neurons.statistics.catalog import schema

N, D, V = 3000, 12, 60


@pytest.fixture(scope="module")
def text():
    """Returns dense activations, tokens, documents, an unembedding."""
    rng = np.random.default_rng(0)
    documents = np.cumsum(rng.random(N) < 0.02)
    dense = random_dense(0, 2, N, D, share=0.2, signed=True)
    return dense, rng.integers(0, V, N), documents, rng.normal(size=(70, V)).astype(np.float32)


def measured(folder, text, cuts, size):
    """Returns all columns, by layer and name."""
    dense, tokens, documents, unembedding = text
    store = make_store(folder, dense, tokens, documents, cuts)
    ids, bounds = store.tokens(0, store.n_tokens), store.document_bounds()
    of_tokens = embeddings.cluster_tokens(unembedding)
    around = embeddings.Contexts(ids, bounds, embeddings.token_vectors(unembedding))
    scores = embeddings.monosemanticity(store, around)
    found = {}
    for number, layer in enumerate(store.metadata.layers):
        similarities = activity.coactivation(store, layer)
        for begin in range(0, D, size):
            end = min(begin + size, D)
            block = store.block(layer, begin, end)
            columns = {
                **activity.columns(block, store.n_tokens),
                **selectivity.columns(block, ids, of_tokens),
                **{name: of_all[number, begin:end] for name, of_all in scores.items()},
                **activity.coactive_columns(similarities, begin, end),
                **activity.example_columns(block, bounds, layer, begin),
            }
            for name, column in columns.items():
                found.setdefault((layer, name), []).extend(column)
    return found


@pytest.mark.parametrize(("cuts", "size"), [((), 1), ((1, 700, 701, 2999), 5), ((1500,), D)])
def test_figures_do_not_depend_on_how_things_are_cut(tmp_path, text, cuts, size):
    wanted = measured(tmp_path / "wanted", text, (1000,), 4)
    found = measured(tmp_path / "found", text, cuts, size)
    assert found.keys() == wanted.keys()
    for (layer, name), column in found.items():
        # These are summed stretch by stretch in float32; the others are the same to the last bit.
        if name.startswith("monosemanticity") or name == "coactive_similarity":
            for one, other in zip(column, wanted[layer, name], strict=True):
                assert (one is None) == (other is None)
                np.testing.assert_allclose(one or 0, other or 0, atol=2e-6)
        else:
            np.testing.assert_equal(column, wanted[layer, name])


def test_columns_have_the_names_and_types_of_the_table(tmp_path, text):
    for (_, name), column in measured(tmp_path / "store", text, (), 5).items():
        array = pa.array(column, schema().field(name).type, from_pandas=True)
        assert len(array) == D
        # Only the last neuron is dead.
        figures_of_the_dead = {"n_active", "density", "n_distinct_tokens"}
        assert array.null_count == (0 if name in figures_of_the_dead else 1), name
