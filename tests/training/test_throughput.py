"""The arithmetic behind tokens per second and MFU."""

from helpers import TINY
import jax
import pytest

from topklm.config import ModelConfig
from topklm.model import transformer
from topklm.training.throughput import Clock, flops_per_token, parameter_count, peak_flops_per_second


def test_flops_per_token_counted_by_hand():
    config = ModelConfig(
        d_model=4, n_heads=2, n_kv_heads=1, d_mlp=8, vocab_size=10, n_layers=3, context_length=5, topk_k=2
    )
    attention = 4 * 4 + 4 * 2 + 4 * 2 + 4 * 4  # query, key, value, out; heads of width 2
    swiglu = 3 * (4 * 8)  # gate, up, down
    matrices = 3 * (attention + swiglu) + 4 * 10  # and the unembedding
    assert matrices == 472
    # 6 per parameter; scores and mixing: 2 products of 2 * 5 * 4 per layer forward, twice that backward.
    assert flops_per_token(config) == 6 * 472 + 3 * (3 * 2 * 2 * 5 * 4) == 3552


def test_flops_count_the_matrices_of_the_real_model():
    sizes = {name.removeprefix("model."): TINY[name] for name in TINY if name.startswith("model.")}
    config = ModelConfig(**sizes, vocab_size=320, vocab_multiple=1)
    params = jax.eval_shape(lambda: transformer.create(config, 0))
    norms = 2 * config.n_layers * config.d_model + config.d_model
    embedding = config.vocab_size * config.d_model
    matrices = parameter_count(params) - norms - embedding
    attention = 12 * config.n_layers * config.d_model * config.context_length
    assert flops_per_token(config) == 6 * matrices + attention


def test_topk_makes_no_arithmetic_that_mfu_counts():
    sparse, base = ModelConfig(vocab_size=9, n_nontopk=1), ModelConfig(vocab_size=9, n_nontopk=4)
    assert flops_per_token(sparse) == flops_per_token(base)


def test_padding_of_the_vocabulary_is_no_arithmetic_that_mfu_counts():
    padded, bare = ModelConfig(vocab_size=9), ModelConfig(vocab_size=9, vocab_multiple=1)
    assert padded.padded_vocab_size == 128
    assert flops_per_token(padded) == flops_per_token(bare)


class Chip:
    def __init__(self, kind):
        self.device_kind = kind


@pytest.mark.parametrize(
    ("kind", "teraflops"), [("TPU v5 lite", 197), ("TPU v5", 459), ("TPU v6 lite", 918), ("TPU v4", 275)]
)
def test_the_peak_of_known_chips_is_the_data_sheets(kind, teraflops):
    assert peak_flops_per_second([Chip(kind)] * 4, "bfloat16") == 4 * teraflops * 1e12


def test_the_peak_of_a_cpu_is_measured():
    peak = peak_flops_per_second(jax.devices("cpu"), "float32")
    assert 1e8 < peak < 1e15


@pytest.fixture
def times(monkeypatch):
    """What the counter and the date show; to be set."""
    shown = {"perf_counter": 0.0, "time": 0.0}
    for name in list(shown):
        monkeypatch.setattr(f"time.{name}", lambda name=name: shown[name])
    return shown


def test_a_clock_counts_only_while_it_runs(times):
    clock = Clock(total=100.0, began_at=0.0)
    for start, stop in ((10.0, 13.0), (20.0, 24.0)):
        times["perf_counter"] = start
        clock.start()
        times["perf_counter"] = stop
        assert clock.now() == (103.0 if stop == 13.0 else 107.0)
        clock.stop()
    times["perf_counter"] = 50.0
    assert clock.now() == clock.total == 107.0


def test_goodput_counts_pauses_between_processes_as_lost(times):
    times["time"] = 1000.0 + 500.0
    clock = Clock(total=100.0, began_at=1000.0)
    assert clock.goodput() == 100 / 500
    clock.start()
    times["perf_counter"] += 50.0
    times["time"] += 50.0
    assert clock.goodput() == 150 / 550


def test_goodput_stays_a_share_when_the_date_is_set_back(times):
    times["time"] = 900.0
    assert Clock(total=100.0, began_at=1000.0).goodput() == 1.0
    times["time"] = 1001.0
    assert Clock(total=100.0, began_at=1000.0).goodput() == 1.0
    assert Clock(total=0.0, began_at=1001.0).goodput() == 0.0
