"""The arithmetic of tokens per second and MFU."""

import math

from helpers import TINY
import jax
import pytest

from topklm.config import Config, ModelConfig
from topklm.model import transformer
from topklm.training import throughput
from topklm.training.metrics import Console
from topklm.training.throughput import (
    Clock,
    data_sheet_peak,
    flops_per_token,
    parameter_count,
    peak_flops_per_second,
)


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
    ("kind", "teraflops"),
    [
        ("TPU v5 lite", 197),
        ("TPU v5", 459),
        ("TPU v6 lite", 918),
        ("TPU v4", 275),
        ("NVIDIA A100-SXM4-40GB", 312),
        ("NVIDIA A100 80GB PCIe", 312),
        ("NVIDIA H100 80GB HBM3", 989),
        ("NVIDIA H100 PCIe", 756),
        ("NVIDIA H100 NVL", 835),
        ("NVIDIA H200", 989),
        ("NVIDIA L4", 121),
        ("NVIDIA L40", 181),
        ("NVIDIA L40S", 362),
        ("Tesla T4", 65),
    ],
)
def test_the_peak_of_known_chips_is_the_data_sheets(kind, teraflops):
    assert peak_flops_per_second([Chip(kind)] * 4, "bfloat16") == 4 * teraflops * 1e12


NO_CHIPS = ["NVIDIA L400", "NVIDIA L40G", "NVIDIA T400", "NVIDIA H100 80GB HBM3 MIG 1g.10gb", "TPU v4 lite"]
NO_CHIPS += ["TPU v50", "NVIDIA H1000", "NVIDIA A100X", "NVIDIA A1000", "Tesla T40", "cpu", ""]


@pytest.mark.parametrize("kind", NO_CHIPS)
def test_a_chip_of_a_longer_or_shorter_name_is_another_chip(kind):
    assert data_sheet_peak(kind) is None


@pytest.fixture
def peaks(monkeypatch):
    """Peaks that measurements give, one after another; the last one again and again."""
    found = [100.0]

    def measure(devices, dtype):
        return found.pop(0) if len(found) > 1 else found[0]

    monkeypatch.setattr(throughput, "peak_flops_per_second", measure)
    monkeypatch.setattr(throughput, "flops_per_token", lambda model: 1.0)
    return found


def rate_of(tokens_per_step=10):
    return throughput.Rate(Config(), tokens_per_step, 0, 0.0)


def test_a_rate_is_taken_over_a_second_or_more(peaks):
    rate = rate_of()
    # The end of a step is seen late, so that the next one seems to take no time.
    assert rate.at(1, 2.0)[0] == 5.0
    assert rate.at(2, 2.001)[0] == pytest.approx(20 / 2.001)
    assert rate.at(3, 3.5)[0] == pytest.approx(10 / 1.499)
    assert rate.at(13, 6.5)[0] == pytest.approx(100 / 3.0)


def test_a_utilisation_above_one_is_measured_again_and_never_shown(peaks):
    peaks[:] = [100.0, 50.0, 400.0, 300.0]
    rate = rate_of(tokens_per_step=200)
    assert math.isnan(rate.at(1, 1.0)[1])  # 200 a second, and the second measurement was no better
    assert rate.at(2, 2.0)[1] == 0.5  # the third was
    rate.measure_again()
    assert rate.at(3, 3.0)[1] == 0.5  # the best one counts


def test_the_peak_of_a_data_sheet_is_not_measured(monkeypatch, peaks):
    monkeypatch.setattr(jax, "devices", lambda: [Chip("NVIDIA L4")])
    peaks[:] = [100.0, 1000.0]
    rate = rate_of(tokens_per_step=200)
    assert math.isnan(rate.at(1, 1.0)[1])
    assert rate.at(2, 3.0)[1] == pytest.approx(1.0)


def test_a_peak_that_is_not_known_is_shown_as_such(capsys):
    console = Console()
    console.start(0, 9)
    console.report(1, loss=1.0, tokens_per_second=5.0, mfu=math.nan)
    assert "| MFU ? |" in capsys.readouterr().out


def test_the_peak_of_a_cpu_is_measured():
    peak = peak_flops_per_second(jax.devices("cpu"), "float32")
    assert 1e8 < peak < 1e15


@pytest.fixture
def times(monkeypatch):
    """Sets the times that the counter and the date show."""
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
