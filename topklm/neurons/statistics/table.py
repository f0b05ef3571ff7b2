"""What is known of every neuron, one row each, as a Parquet file.

Columns and their meaning are `COLUMNS`; what they were measured on stands in the file's own metadata, as
`Measured`. Definitions of the figures are in the modules that compute them. A figure that cannot be given
(of a dead neuron, say) is null.

Before the file's footer stands the SHA-256 of all the rest of it, in a place that other readers of Parquet
pass over. Files of format 1 do not have it.
"""

from collections.abc import Mapping
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from topklm.errors import UserError
from topklm.neurons.folder import damage_is_a_user_error
from topklm.neurons.store import Store
from topklm.storage.files import parse_json, write_atomically

FORMAT = 2
RANGE_PARTS = 5  # into which the range of a neuron's activations is cut, for examples

_METADATA_KEY = b"topklm"
_OF_FORMAT_1 = b'"format": 1'  # stands in the footer, as it is
_DIGEST_BYTES = 64

_AGAIN = "delete it, and run topklm neurons measure"

_F64, _I32, _I64 = pa.float64(), pa.int32(), pa.int64()
COLUMNS = pa.schema(
    [
        ("layer", _I32),  # of the model's layers, from 0
        ("neuron", _I32),
        ("n_active", _I64),  # tokens at which it is active
        ("density", _F64),  # that as a share of all tokens
        ("mean_activation", _F64),  # over the tokens at which it is active
        ("max_activation", _F64),
        # Tokens by activation: `activity.HISTOGRAM_BINS` parts of equal width from 0 to max_activation.
        ("histogram", pa.list_(_I64)),
        ("n_distinct_tokens", _I64),  # ids among the tokens at which it is active
        ("token_entropy", _F64),  # nats, plug-in
        ("token_entropy_corrected", _F64),  # nats, Miller-Madow
        ("semantic_entropy", _F64),  # nats, plug-in
        ("semantic_entropy_corrected", _F64),
        ("monosemanticity", _F64),
        ("monosemanticity_shuffled", _F64),  # the same with contexts dealt out anew: what chance gives
        # Input tokens by their share of the neuron's whole activation, the largest first.
        ("top_tokens", pa.list_(_I32)),
        ("top_token_shares", pa.list_(_F64)),
        # Output tokens that it raises most (from the top) and lowers most (from the bottom), and by how much.
        ("identity_top", pa.list_(_I32)),
        ("identity_top_effects", pa.list_(_F64)),
        ("identity_bottom", pa.list_(_I32)),
        ("identity_bottom_effects", pa.list_(_F64)),
        ("jacobian_top", pa.list_(_I32)),
        ("jacobian_top_effects", pa.list_(_F64)),
        ("jacobian_bottom", pa.list_(_I32)),
        ("jacobian_bottom_effects", pa.list_(_F64)),
        # Change of the next token's loss, nats, when the neuron is set to 0 at a token at which it is active.
        ("ablation_effect", _F64),  # mean
        ("ablation_standard_error", _F64),
        ("ablation_samples", _I32),
        # Neurons of the same layer, the nearest first.
        ("coactive", pa.list_(_I32)),
        ("coactive_similarity", pa.list_(_F64)),
        ("similar_effect", pa.list_(_I32)),
        ("similar_effect_similarity", pa.list_(_F64)),
        # Tokens of the store: the strongest, and some from each part of the range; see `examples`.
        ("examples", pa.list_(_I64)),
        ("example_activations", pa.list_(_F64)),
        ("example_parts", pa.list_(pa.int8())),  # 0: the strongest; 1 to RANGE_PARTS: from that part, rising
    ]
)


@dataclasses.dataclass(frozen=True)
class Measured:
    """What the figures of a table were measured on.

    Attributes:
        run: Name of the run folder.
        step: Of the checkpoint.
        tokenizer_sha256: Of the tokenizer.
        kind: "topk"; "dense", the positive part of a Base LM's hidden state; or that of a dictionary which it
            is written in: "random", "pca" or "sae".
        layers: The model's layers that have rows.
        d_model: D, neurons per layer.
        topk_k: k; of a Base LM, how many entries or codes of each token were kept, D where all were.
        source: What the text was.
        n_tokens: Tokens of text; separators and padding are not among them.
        n_documents: Of which those are.
        embedding: What semantic entropy and monosemanticity compare tokens by.
        n_clusters: Of tokens, for semantic entropy.
        details: Sample sizes, seeds and the like, by name.
        dictionary: How the dictionary was made; empty where there is none. Its logit effects are those of the
            decoder's directions, and ablation effects are null.
        store: `Store.sha256`; empty where that, or the table, is of format 1.
    """

    run: str
    step: int
    tokenizer_sha256: str
    kind: str
    layers: tuple[int, ...]
    d_model: int
    topk_k: int
    source: str
    n_tokens: int
    n_documents: int
    embedding: str
    n_clusters: int
    details: Mapping[str, Any]
    dictionary: str = ""
    store: str = ""


def write(path: Path, rows: pa.Table, measured: Measured) -> None:
    """Writes a table of `COLUMNS`, sorted by layer and neuron; it is there whole or not at all."""
    content = {"format": FORMAT, **dataclasses.asdict(measured)}
    rows = rows.cast(COLUMNS).replace_schema_metadata({_METADATA_KEY: json.dumps(content).encode()})
    sink = pa.BufferOutputStream()
    pq.write_table(rows, sink, compression="zstd", write_page_checksum=True)
    write_atomically(path, _sealed(sink.getvalue().to_pybytes()))


def read(path: Path) -> tuple[pa.Table, Measured]:
    """What `write` has written.

    Raises:
        UserError: If it is missing, damaged, or of another version.
    """
    with damage_is_a_user_error(path, _AGAIN, pa.ArrowException, TypeError, KeyError):
        try:
            content = path.read_bytes()
        except FileNotFoundError as e:
            raise UserError(f"{path} is missing: run topklm neurons measure") from e
        if _OF_FORMAT_1 not in content:
            content = _unsealed(content)
        rows = pq.read_table(pa.BufferReader(content), page_checksum_verification=True)
        measured = parse_json((rows.schema.metadata or {})[_METADATA_KEY])
        if measured.pop("format") not in (1, FORMAT) or rows.schema.names != COLUMNS.names:
            raise UserError(f"{path} was written by another version of topklm: delete it, and measure again")
        measured["layers"] = tuple(measured["layers"])
        return rows, Measured(**measured)


def check_same(path: Path, measured: Measured, store: Store) -> None:
    """Refuses a table that was not measured on a store, or one with other tokens.

    Args:
        path: Of the table, for the message.
        measured: Of the table.
        store: Of activations; it may hold more tokens than were measured.

    Raises:
        UserError: If they differ.
    """
    names = ("step", "tokenizer_sha256", "kind", "layers", "d_model", "topk_k", "dictionary")
    pairs = {name: (getattr(measured, name), getattr(store.metadata, name)) for name in names}
    if measured.store and store.sha256:
        pairs["store"] = measured.store[:12], store.sha256[:12]
    for name, (here, there) in pairs.items():
        if here != there:
            raise UserError(
                f"{path} was measured on another {name} ({here!r}) than {store.folder} holds ({there!r}): "
                f"{_AGAIN}"
            )
    if measured.n_tokens > store.n_tokens:
        raise UserError(
            f"{path} was measured on {measured.n_tokens:,} tokens, and {store.folder} holds "
            f"{store.n_tokens:,}: {_AGAIN}"
        )


def _sealed(content: bytes) -> bytes:
    """Puts its digest into a Parquet file."""
    at = _footer(content)
    return content[:at] + hashlib.sha256(content).hexdigest().encode() + content[at:]


def _unsealed(content: bytes) -> bytes:
    """Takes the digest out of a file; raises ValueError if that is not its own."""
    at = _footer(content)
    before, digest = content[: at - _DIGEST_BYTES], content[at - _DIGEST_BYTES : at]
    if at < _DIGEST_BYTES or hashlib.sha256(before + content[at:]).hexdigest().encode() != digest:
        raise ValueError("its digest differs")
    return before + content[at:]


def _footer(content: bytes) -> int:
    """Returns the place of the footer, before 4 bytes of its length and 4 of a mark; below 0: nowhere."""
    return len(content) - 8 - int.from_bytes(content[-8:-4], "little")
