"""The files for Neuronpedia, against its schema and against dense arrays and plain loops."""

import dataclasses
import gzip
import json

import ml_dtypes
import numpy as np
import pyarrow as pa
import pytest
import saved_runs

from topklm.errors import UserError
from topklm.explorer import neuron_data, neuronpedia
from topklm.explorer.neuron_data import NeuronData
from topklm.explorer.neuronpedia import export
from topklm.neurons import NeuronsFolder
from topklm.neurons import segment as segment_lib
from topklm.neurons.labels import Labels
from topklm.neurons.statistics import activity, catalog, table
from topklm.neurons.store import Metadata, Store, StoreWriter
from topklm.progress import Progress

# From hijohnnylin/neuronpedia, apps/webapp/prisma/schema.prisma at 008d5040ab97abd5c44d92d190b30034ad7a6e97:
# columns and types; ? may be null, = has a default that need not be given, [] is a list. Columns that point
# from a table to rows of another are left out. `Activation.id` and `Explanation.id` have a default in
# Prisma's client, which the import of files of lines does not use, so they must be given.
SCHEMA = {
    "SourceRelease": """name String; visibility String=; isNewUi Boolean=; featured Boolean=;
        description String; descriptionShort String?; urls String[]; creatorEmail String?;
        creatorName String; creatorNameShort String?; creatorId String; defaultSourceSetName String?;
        defaultSourceId String?; defaultUmapSourceIds String[]=; createdAt DateTime=""",
    "Model": """id String; displayNameShort String=; displayName String=; creatorId String; tlensId String?;
        openRouterId String?; dimension Int?; thinking Boolean=; visibility String=;
        defaultSourceSetName String?; defaultSourceId String?; defaultGraphSourceSetName String?;
        inferenceEnabled Boolean=; instruct Boolean=; layers Int; neuronsPerLayer Int; createdAt DateTime=;
        owner String; updatedAt DateTime=; website String?""",
    "SourceSet": """modelId String; name String; hasDashboards Boolean=; allowInferenceSearch Boolean=;
        visibility String=; description String; type String=; creatorName String; urls String[];
        creatorEmail String?; creatorId String; releaseName String?; hasGraphs Boolean=;
        graphEnabled Boolean=; similarityMatrixEnabled Boolean=; defaultOfModelId String?;
        defaultGraphModelId String?; defaultRange Int=; defaultShowBreaks Boolean=; showDfa Boolean=;
        showCorrelated Boolean=; showHeadAttribution Boolean=; showUmap Boolean=; createdAt DateTime=""",
    "Source": """id String; modelId String; hasDashboards Boolean=; inferenceEnabled Boolean=;
        saelensConfig Json?; saelensRelease String?; saelensSaeId String?; hfRepoId String?;
        hfFolderId String?; visibility String=; defaultOfModelId String?; setName String; creatorId String;
        hasUmap Boolean=; hasUmapLogSparsity Boolean=; hasUmapClusters Boolean=; num_prompts Int?;
        num_tokens_in_prompt Int?; dataset String?; notes String?; cosSimMatchModelId String?;
        cosSimMatchSourceId String?; createdAt DateTime=""",
    "Neuron": """modelId String; layer String; index String; sourceSetName String?; creatorId String?;
        createdAt DateTime=; maxActApprox Float?; hasVector Boolean=; vector Float[]=; vectorLabel String?;
        vectorDefaultSteerStrength Float?; hookName String?; topkCosSimIndices Int[]=;
        topkCosSimValues Float[]=; neuron_alignment_indices Int[]=; neuron_alignment_values Float[]=;
        neuron_alignment_l1 Float[]=; correlated_neurons_indices Int[]=;
        correlated_neurons_pearson Float[]=; correlated_neurons_l1 Float[]=;
        correlated_features_indices Int[]=; correlated_features_pearson Float[]=;
        correlated_features_l1 Float[]=; neg_str String[]=; neg_values Float[]=; pos_str String[]=;
        pos_values Float[]=; frac_nonzero Float=; freq_hist_data_bar_heights Float[]=;
        freq_hist_data_bar_values Float[]=; logits_hist_data_bar_heights Float[]=;
        logits_hist_data_bar_values Float[]=; decoder_weights_dist Float[]=; umap_cluster Int?;
        umap_log_feature_sparsity Float?; umap_x Float?; umap_y Float?""",
    "Activation": """id String; tokens String[]; dataIndex String?; index String; layer String;
        modelId String; dataSource String?; maxValue Float; maxValueTokenIndex Int; minValue Float;
        values Float[]; dfaValues Float[]=; dfaTargetIndex Int?; dfaMaxValue Float?; zQIndices Int[]=;
        zKIndices Int[]=; zValues Float[]=; creatorId String; createdAt DateTime=; lossValues Float[]=;
        logitContributions String?; binMin Float?; binMax Float?; binContains Float?;
        qualifyingTokenIndex Int?""",
    "Explanation": """id String; modelId String; layer String; index String; description String;
        authorId String; triggeredByUserId String?; notes String?; scoreV1 Float=; scoreV2 Float?;
        umap_x Float?; umap_y Float?; umap_cluster Int?; umap_log_feature_sparsity Float?; typeName String?;
        explanationModelName String?; createdAt DateTime=; updatedAt DateTime=""",
}
# Which file goes into which table: apps/webapp/app/api/admin/import/route.ts at 66486fd45bfe.
TABLE_OF = {
    "release.jsonl": "SourceRelease",
    "model.jsonl": "Model",
    "sourceset.jsonl": "SourceSet",
    "source.jsonl": "Source",
    "features": "Neuron",
    "activations": "Activation",
    "explanations": "Explanation",
}
# Fields of the dataclasses Feature and Activation of jbloomAus/SAEDashboard,
# sae_dashboard/neuronpedia/neuronpedia_export.py at 3ea1249ac0e31c3f8433c6c270c40d4e3bec9169, but for
# createdAt, which the database fills, and zIndices and zValues, which attention heads have.
DASHBOARD_FEATURE = """
    modelId layer index creatorId maxActApprox hasVector vector vectorLabel vectorDefaultSteerStrength
    hookName topkCosSimIndices topkCosSimValues neuron_alignment_indices neuron_alignment_values
    neuron_alignment_l1 correlated_neurons_indices correlated_neurons_pearson correlated_neurons_l1
    correlated_features_indices correlated_features_pearson correlated_features_l1 neg_str neg_values
    pos_str pos_values frac_nonzero freq_hist_data_bar_heights freq_hist_data_bar_values
    logits_hist_data_bar_heights logits_hist_data_bar_values decoder_weights_dist sourceSetName"""
DASHBOARD_ACTIVATION = """
    id tokens index layer modelId maxValue maxValueTokenIndex minValue values creatorId dataSource
    dataIndex dfaValues dfaTargetIndex dfaMaxValue lossValues logitContributions binMin binMax binContains
    qualifyingTokenIndex"""
TYPES = {"String": str, "Int": int, "Float": (int, float), "Boolean": bool, "DateTime": str, "Json": object}

LAYERS, D, K = (0, 1), 24, 5
DEAD = 7
# Shorter than a window, as long, longer, much longer; and documents of one token.
SIZES = (1, 40, 128, 1, 129, 700, 3, 300, 5, 1000, 90)


@dataclasses.dataclass
class Case:
    """A store, a table and all that they are of as dense arrays."""

    folder: NeuronsFolder
    layers: np.ndarray  # float64[S, N, D]
    tokens: np.ndarray
    losses: np.ndarray  # float64[N]
    documents: np.ndarray
    rows: list[dict]

    @property
    def store(self):
        return Store(self.folder.store)


def metadata_of(kind="topk"):
    return Metadata(
        run="village",
        step=24,
        tokenizer_sha256=saved_runs.tokenizer().sha256,
        source="held-out text of village-0123",
        kind=kind,
        layers=LAYERS,
        d_model=D,
        topk_k=K if kind == "topk" else D,
        topk_activation="relu",
        context_length=64,
    )


def make_case(place, *, signs=False, kind="topk", nan=False):
    rng = np.random.default_rng(3)
    n = sum(SIZES)
    layers = np.maximum(rng.normal(-1, 1, size=(len(LAYERS), n, D)), 0)
    # Some strong and rare, so that the parts of the range hold very different numbers.
    layers[..., :4] *= np.where(rng.random((len(LAYERS), n, 4)) < 0.02, 9, 1)
    layers[:, :, DEAD] = 0
    layers[1, :, 12:] = 0
    if signs:
        layers *= np.where(rng.random(layers.shape) < 0.4, -1, 1)
    layers = layers.astype(ml_dtypes.bfloat16)
    tokens = rng.integers(0, 256, n)
    losses = rng.gamma(2, 2, n).astype(np.float16)
    if nan:
        losses[5] = np.nan
    documents = np.repeat(np.arange(3, 3 + len(SIZES)), SIZES)
    run = place / "run"
    saved_runs.describe(run)
    folder = NeuronsFolder(run, 24)
    writer = StoreWriter(folder.store, metadata_of(kind))
    for part in np.split(np.arange(n), [100, 101, 900]):
        arrays = tokens[part], documents[part], losses[part]
        writer.append(segment_lib.from_dense(*arrays, [layer[part] for layer in layers]))
    store = Store(folder.store)
    rows = write_table(folder, store, rng)
    numbers = losses.astype(np.float64)
    return Case(folder, layers.astype(np.float64), tokens, numbers, documents, rows)


def write_table(folder, store, rng):
    """Makes a table with activity and examples of the store, and drawn lenses and neighbours."""
    rows = []
    bounds = store.document_bounds()
    for layer in LAYERS:
        block = store.block(layer, 0, D)
        columns = {
            **activity.columns(block, store.n_tokens),
            **activity.example_columns(block, bounds, layer, 0),
        }
        for j in range(D):
            row = dict.fromkeys(catalog.schema().names)
            row |= {name: column[j] for name, column in columns.items()}
            row |= {name: None for name, value in row.items() if value is not None and value != value}
            row |= {"layer": layer, "neuron": j, "n_active": int(row["n_active"])}
            for end in ("top", "bottom"):
                row[f"identity_{end}"] = rng.integers(0, 257, 10).tolist()
                row[f"identity_{end}_effects"] = rng.normal(size=10).tolist()
            if row["n_active"]:
                row["coactive"] = rng.permutation(D)[:6].tolist()
                row["coactive_similarity"] = rng.random(6).tolist()
            rows.append(row)
    metadata = store.metadata
    measured = table.TableMetadata(
        run=metadata.run,
        step=metadata.step,
        tokenizer_sha256=metadata.tokenizer_sha256,
        kind=metadata.kind,
        layers=LAYERS,
        d_model=D,
        topk_k=metadata.topk_k,
        source=metadata.source,
        n_tokens=store.n_tokens,
        n_documents=len(SIZES),
        embedding="none",
        n_clusters=1,
        details={},
    )
    table.write(folder.table, pa.Table.from_pylist(rows, catalog.schema()), measured)
    return rows


@pytest.fixture(scope="module")
def case(tmp_path_factory):
    case = make_case(tmp_path_factory.mktemp("case"))
    Labels(case.folder.labels).set(1, 4, 'the sea, "blue" </script>')
    return case


def run_export(case, out, **changes):
    export(NeuronData(case.folder), out, **{"model_id": "village-24", **changes})
    return out


@pytest.fixture(scope="module")
def written(case, tmp_path_factory):
    return run_export(case, tmp_path_factory.mktemp("out") / "export")


def lines(path):
    content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    assert content.endswith(b"\n")
    return [json.loads(line) for line in content[:-1].split(b"\n")]


def lines_of(out, layer, what, kind="topk"):
    """Returns all lines of a kind of a layer, in the order of the batches."""
    folder = out / "village-24" / f"{layer}-res-{kind}" / what
    paths = sorted(folder.glob("*"), key=lambda path: int(path.name.split(".")[0].removeprefix("batch-")))
    return [line for path in paths for line in lines(path)]


def columns_of(name):
    """Returns column -> (type, is a list, may be null, need not be given)."""
    columns = {}
    for column in SCHEMA[name].split(";"):
        title, kind = column.split()
        bare = kind.rstrip("?=").removesuffix("[]")
        columns[title] = (TYPES[bare], "[]" in kind, "?" in kind, "?" in kind or "=" in kind)
    return columns


def check_row(name, row):
    columns = columns_of(name)
    assert set(row) <= set(columns)
    assert {title for title, (*_, optional) in columns.items() if not optional} <= set(row)
    for title, value in row.items():
        kind, is_list, nullable, _ = columns[title]
        if value is None:
            assert nullable, title
            continue
        assert isinstance(value, list) == is_list, title
        for element in value if is_list else [value]:
            assert isinstance(element, kind), title
            assert kind is bool or not isinstance(element, bool), title


def bounds_of(case, at):
    """Returns the first token of the document of a token, and the one after its last, by walking."""
    first = behind = at
    while first > 0 and case.documents[first - 1] == case.documents[at]:
        first -= 1
    while behind < len(case.documents) and case.documents[behind] == case.documents[at]:
        behind += 1
    return first, behind


def examples_of(case, layer):
    """Yields (row of the table, place, part) of every example of a layer, in order."""
    return [
        (row, at, part)
        for row in case.rows
        if row["layer"] == layer and row["examples"]
        for at, part in zip(row["examples"], row["example_parts"], strict=True)
    ]


def test_there_is_a_folder_for_each_layer_with_the_files_of_the_import(written):
    found = sorted(str(path.relative_to(written)) for path in written.rglob("*") if path.is_file())
    names = ["features/batch-0.jsonl.gz", "activations/batch-0.jsonl.gz", *list(TABLE_OF)[:4]]
    expected = [f"village-24/{layer}-res-topk/{name}" for layer in LAYERS for name in names]
    assert found == sorted([*expected, "village-24/1-res-topk/explanations/batch-0.jsonl.gz"])


def test_every_line_fits_the_schema_of_its_table(written):
    seen = set()
    for path in written.rglob("*.jsonl*"):
        name = TABLE_OF[path.name if path.suffix == ".jsonl" else path.parent.name]
        for row in lines(path):
            check_row(name, row)
        seen.add(name)
    assert seen == set(SCHEMA)


def test_every_line_of_a_file_has_the_columns_of_its_first(written):
    for path in written.rglob("*.jsonl.gz"):
        assert len({tuple(row) for row in lines(path)}) == 1


def test_features_and_activations_have_the_fields_that_sae_dashboard_writes(written):
    assert set(lines_of(written, 0, "features")[0]) == set(DASHBOARD_FEATURE.split())
    assert set(lines_of(written, 0, "activations")[0]) == set(DASHBOARD_ACTIVATION.split())


def test_rows_point_to_one_another(written):
    for layer in LAYERS:
        folder = written / "village-24" / f"{layer}-res-topk"
        [release], [model], [group], [source] = (lines(folder / name) for name in list(TABLE_OF)[:4])
        assert source["id"] == folder.name
        assert source["setName"] == group["name"]
        assert group["releaseName"] == release["name"] != model["id"]
        assert model["id"] == group["modelId"] == source["modelId"] == "village-24"
        assert (model["layers"], model["dimension"]) == (saved_runs.MODEL.n_layers, D)
        for row in lines_of(written, layer, "features"):
            assert (row["modelId"], row["layer"], row["sourceSetName"]) == (
                model["id"],
                source["id"],
                group["name"],
            )
            assert row["hookName"] == f"blocks.{layer}.hook_topk"


def test_windows_hold_the_store_s_tokens_values_and_losses(case, written):
    strings = saved_runs.tokenizer().token_strings(case.tokens)
    for layer in LAYERS:
        rows = lines_of(written, layer, "activations")
        for row, (neuron, at, _) in zip(rows, examples_of(case, layer), strict=True):
            first, behind = bounds_of(case, at)
            begin = max(first, min(at - 64, behind - 128))
            end = min(begin + 128, behind)
            dense = case.layers[layer, begin:end, neuron["neuron"]].tolist()
            assert row["index"] == str(neuron["neuron"])
            assert row["tokens"] == strings[begin:end]
            assert row["values"] == dense
            assert row["lossValues"] == case.losses[begin:end].tolist()
            assert row["qualifyingTokenIndex"] == at - begin
            assert (row["maxValue"], row["minValue"]) == (max(dense), min(dense))
            assert row["maxValueTokenIndex"] == dense.index(max(dense))


def test_bins_are_those_that_examples_were_chosen_from(case, written):
    for layer in LAYERS:
        rows = lines_of(written, layer, "activations")
        for row, (neuron, at, part) in zip(rows, examples_of(case, layer), strict=True):
            dense = case.layers[layer, :, neuron["neuron"]]
            if part == 0:
                assert (row["binMin"], row["binMax"], row["binContains"]) == (-1, dense.max(), -1)
                continue
            assert (row["binMin"], row["binMax"]) == pytest.approx(
                ((part - 1) / 5 * dense.max(), part / 5 * dense.max()), rel=1e-12
            )
            assert row["binMin"] < dense[at] <= row["binMax"] * (1 + 1e-12)
            counted = sum(
                row["binMin"] * (1 + 1e-12) < value <= row["binMax"] * (1 + 1e-12) for value in dense
            )
            inactive = sum(value == 0 for value in dense) if part == 1 else 0
            assert row["binContains"] == (counted + inactive) / len(dense)


def test_features_hold_the_table_s_figures(case, written):
    tokenizer = saved_runs.tokenizer()
    for layer in LAYERS:
        rows = lines_of(written, layer, "features")
        assert [row["index"] for row in rows] == [str(j) for j in range(D)]
        for j, row in enumerate(rows):
            known = case.rows[LAYERS.index(layer) * D + j]
            dense = case.layers[layer, :, j]
            assert row["frac_nonzero"] == np.count_nonzero(dense) / len(dense)
            assert row["maxActApprox"] == dense.max()
            assert row["pos_values"] == known["identity_top_effects"]
            assert row["neg_values"] == known["identity_bottom_effects"]
            assert row["pos_str"] == tokenizer.token_strings(known["identity_top"])
            assert row["neg_str"] == tokenizer.token_strings(known["identity_bottom"])
            assert row["correlated_features_indices"] == (known["coactive"] or [])
            assert row["correlated_features_l1"] == (known["coactive_similarity"] or [])
            heights, middles = row["freq_hist_data_bar_heights"], row["freq_hist_data_bar_values"]
            if not dense.any():
                assert heights == middles == []
                continue
            width = dense.max() / 40
            assert middles == pytest.approx([(n + 0.5) * width for n in range(40)], rel=1e-12)
            counts = [0] * 40
            for value in dense[dense > 0]:
                counts[min(int(np.ceil(value / width - 1e-9)) - 1, 39)] += 1
            assert heights == counts


def test_a_dead_neuron_has_a_feature_and_no_activations(written):
    feature = lines_of(written, 0, "features")[DEAD]
    assert (feature["frac_nonzero"], feature["maxActApprox"], len(feature["pos_str"])) == (0, 0, 10)
    assert str(DEAD) not in {row["index"] for row in lines_of(written, 0, "activations")}


def test_ids_are_distinct_and_as_long_as_theirs(written):
    ids = [row["id"] for layer in LAYERS for row in lines_of(written, layer, "activations")]
    assert len(set(ids)) == len(ids)
    assert {len(name) for name in ids} == {25}


def test_a_label_becomes_an_explanation(written):
    [row] = lines_of(written, 1, "explanations")
    assert (row["index"], row["description"]) == ("4", 'the sea, "blue" </script>')
    assert row["authorId"] == neuronpedia.CREATOR_ID
    assert not lines_of(written, 0, "explanations")


def test_small_strips_blocks_and_batches_write_the_same_lines(case, written, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_STRIP", 100)
    monkeypatch.setattr(neuron_data, "_AHEAD_EVENTS", 1000)
    monkeypatch.setattr(neuronpedia, "_BATCH", 5)
    out = run_export(case, tmp_path / "out")
    for layer in LAYERS:
        for what in ("features", "activations", "explanations"):
            assert lines_of(out, layer, what) == lines_of(written, layer, what)
    folder = out / "village-24"
    assert len(list((folder / "0-res-topk" / "activations").iterdir())) == 5
    # Of the second layer the last neurons are dead: a file without lines would stop the import.
    assert len(list((folder / "1-res-topk" / "features").iterdir())) == 5
    assert len(list((folder / "1-res-topk" / "activations").iterdir())) == 3


def test_little_of_the_store_is_read_at_once(case, tmp_path, monkeypatch):
    monkeypatch.setattr(neuronpedia, "_STRIP", 100)
    monkeypatch.setattr(neuron_data, "_AHEAD_EVENTS", 500)
    texts, blocks = [], []
    stretch, block = Store._stretch, Store.block

    def spied_stretch(self, name, begin, end):
        texts.append(end - begin)
        return stretch(self, name, begin, end)

    def spied_block(self, layer, begin, end):
        found = block(self, layer, begin, end)
        blocks.append((end - begin, len(found.tokens)))
        return found

    monkeypatch.setattr(Store, "_stretch", spied_stretch)
    monkeypatch.setattr(Store, "block", spied_block)
    run_export(case, tmp_path / "out")
    assert max(texts) <= 100 + 2 * 128 + 1
    assert all(n_neurons == 1 or n_events <= 500 for n_neurons, n_events in blocks)
    assert max(n_neurons for n_neurons, _ in blocks) > 1


def test_the_same_store_gives_the_same_bytes(case, written, tmp_path):
    again = run_export(case, tmp_path / "out")
    for path in written.rglob("*.jsonl*"):
        assert (again / path.relative_to(written)).read_bytes() == path.read_bytes()


def test_only_the_neurons_asked_for_are_written(case, written, tmp_path):
    out = run_export(case, tmp_path / "out", neurons=[(1, 9), (1, 2), (1, 9), (1, 3)])
    assert [path.name for path in (out / "village-24").iterdir()] == ["1-res-topk"]
    for what in ("features", "activations"):
        every = lines_of(written, 1, what)
        assert lines_of(out, 1, what) == [row for row in every if row["index"] in ("2", "3", "9")]
    assert not lines_of(out, 1, "explanations")


def test_values_may_have_signs(tmp_path):
    case = make_case(tmp_path, signs=True)
    out = run_export(case, tmp_path / "out")
    rows = lines_of(out, 0, "activations")
    seen = set()
    for row, (neuron, at, part) in zip(rows, examples_of(case, 0), strict=True):
        value = case.layers[0, at, neuron["neuron"]]
        seen.add(np.sign(value))
        assert row["values"][row["qualifyingTokenIndex"]] == value
        assert row["minValue"] == min(row["values"])
        assert part == 0 or row["binMin"] < abs(value) <= row["binMax"] * (1 + 1e-12)
    assert seen == {-1, 1}


def test_neurons_of_a_base_lm_are_named_as_such(tmp_path):
    case = make_case(tmp_path, kind="dense")
    out = run_export(case, tmp_path / "out")
    assert {path.name for path in (out / "village-24").iterdir()} == {"0-res-dense", "1-res-dense"}
    assert lines_of(out, 1, "features", "dense")[0]["hookName"] == "blocks.1.hook_resid_post"


def test_a_loss_that_the_store_does_not_have_is_null(tmp_path):
    case = make_case(tmp_path, nan=True)
    out = run_export(case, tmp_path / "out")
    losses = [loss for row in lines_of(out, 0, "activations") for loss in row["lossValues"]]
    assert None in losses
    assert all(loss is None or loss >= 0 for loss in losses)


def test_who_it_belongs_to_can_be_said(case, tmp_path):
    out = run_export(case, tmp_path / "out", creator_id="someone")
    creators = {row["creatorId"] for row in lines_of(out, 0, "features") + lines_of(out, 0, "activations")}
    assert creators == {"someone"}


def test_what_fails_leaves_nothing_behind(case, tmp_path, monkeypatch):
    write, calls = neuronpedia._write, []

    def failing(path, rows):
        calls.append(path)
        if len(calls) == 4:
            raise OSError(28, "No space left on device")
        write(path, rows)

    monkeypatch.setattr(neuronpedia, "_write", failing)
    with pytest.raises(UserError, match="no space left"):
        run_export(case, tmp_path / "out")
    assert calls[0].exists() is False
    assert list(tmp_path.iterdir()) == []


def test_it_is_not_there_before_it_is_whole(case, tmp_path):
    seen = []

    class Watching(Progress):
        def phase(self, what, total):
            seen.append(total)
            return super().phase(what, total)

        def __init__(self):
            super().__init__(lambda text: None)

    write = neuronpedia._write

    def watched(path, rows):
        seen.append((tmp_path / "out").exists())
        write(path, rows)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(neuronpedia, "_write", watched)
        run_export(case, tmp_path / "out", progress=Watching())
    assert seen[0] == len(LAYERS) * D
    assert seen[1:] == [False] * 6
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_folder_that_holds_something_is_not_written_to(case, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("mine")
    with pytest.raises(UserError, match="exists: give a folder"):
        run_export(case, tmp_path / "out")
    (tmp_path / "out" / "mine.txt").unlink()
    run_export(case, tmp_path / "out")
    with pytest.raises(UserError, match="exists: give a folder"):
        run_export(case, tmp_path / "out")


@pytest.mark.parametrize("model_id", ["", "Village", "a/b", "..", "a b", "x" * 129, "café"])
def test_a_model_id_that_neuronpedia_would_refuse_is_refused(case, tmp_path, model_id):
    with pytest.raises(UserError, match="model id = "):
        run_export(case, tmp_path / "out", model_id=model_id)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("neurons", "message"),
    [([(2, 0)], "layer 2: must be one of 0, 1"), ([(0, D)], "neuron 24: must be from 0 to 23"), ([], "none")],
)
def test_neurons_that_there_are_not_are_refused(case, tmp_path, neurons, message):
    with pytest.raises(UserError, match=message):
        run_export(case, tmp_path / "out", neurons=neurons)
    assert not (tmp_path / "out").exists()


def test_statistics_of_less_text_than_the_store_holds_are_refused(tmp_path):
    case = make_case(tmp_path)
    more = [np.zeros((3, D), ml_dtypes.bfloat16)] * len(LAYERS)
    writer = StoreWriter(case.folder.store, metadata_of())
    writer.append(segment_lib.from_dense(np.zeros(3, int), np.full(3, 99), np.zeros(3), more))
    with pytest.raises(UserError, match=r"measured on 2,397 tokens, and .* holds 2,400"):
        run_export(case, tmp_path / "out")


def test_statistics_of_another_checkpoint_are_refused(tmp_path):
    case = make_case(tmp_path)
    rows, measured = table.read(case.folder.table)
    table.write(case.folder.table, rows, dataclasses.replace(measured, step=25))
    with pytest.raises(UserError, match="another step"):
        run_export(case, tmp_path / "out")


def test_examples_that_the_store_does_not_hold_are_refused(tmp_path):
    case = make_case(tmp_path)
    rows, measured = table.read(case.folder.table)
    broken = rows.to_pylist()
    broken[3]["example_activations"][0] += 0.5
    table.write(case.folder.table, pa.Table.from_pylist(broken, catalog.schema()), measured)
    with pytest.raises(UserError, match="layer 0, neuron 3: the store does not hold the examples"):
        run_export(case, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_another_tokenizer_is_refused(tmp_path):
    case = make_case(tmp_path)
    tokenizer = case.folder.run / "tokenizer.json"
    tokenizer.write_bytes(tokenizer.read_bytes() + b"\n")
    with pytest.raises(UserError, match="another tokenizer"):
        run_export(case, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_statistics_that_are_not_there_are_missed(tmp_path):
    case = make_case(tmp_path)
    case.folder.table.unlink()
    with pytest.raises(UserError, match="run topklm neurons measure"):
        run_export(case, tmp_path / "out")
