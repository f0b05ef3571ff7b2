"""Figures that follow from the numbers of a compile check, by hand."""

import dataclasses
import json
import math

import pytest

from topklm.compile_check.check import GIB, Memory, Report, Traffic, as_text, from_dict

PARAMETERS = Traffic("all-gather", ("fsdp",), False, count=24, bytes=2**30, bytes_sent=9e8, seconds=0.02)
TOKENS = Traffic("reduce-scatter", ("tensor",), False, count=48, bytes=2**28, bytes_sent=2e8, seconds=0.03)
REPORT = Report(
    config="configs/made.py",
    topology="v5e:4x4",
    n_slices=1,
    mesh={"data": 1, "fsdp": 8, "context": 1, "tensor": 2},
    parameters=1_000_000,
    tokens_per_device=1000.0,
    memory=Memory(arguments=GIB, outputs=0, temporaries=2 * GIB, program=0),
    model_flops=197e12 * 0.08,
    compiled_flops=197e12 * 0.1,
    hbm_traffic=819e9 * 0.2,
    traffic=(PARAMETERS, TOKENS),
    compile_seconds=1.0,
)


def test_times_are_sizes_over_the_data_sheets_rates():
    assert REPORT.compute_seconds == pytest.approx(0.1)
    assert REPORT.hbm_seconds == pytest.approx(0.2)
    assert REPORT.communication_seconds == pytest.approx(0.05)
    assert REPORT.communication_share == pytest.approx(1 / 3)


def test_communication_binds_below_the_tokens_at_which_it_takes_as_long_as_the_products():
    n = REPORT.critical_tokens
    # The products and the tensor axis's traffic grow with the tokens, the parameters' traffic does not.
    assert 0.1 * n / 1000 == pytest.approx(0.02 + 0.03 * n / 1000)


def test_traffic_that_grows_faster_than_the_products_binds_always():
    slow = dataclasses.replace(TOKENS, seconds=0.2)
    report = dataclasses.replace(REPORT, traffic=(PARAMETERS, slow))
    assert math.isinf(report.critical_tokens)
    assert "always" in as_text(report)


@pytest.mark.parametrize(
    ("kind", "axes", "does"),
    [
        ("all-reduce", ("data",), True),
        ("all-reduce", ("data", "fsdp", "tensor"), True),
        ("all-reduce", ("context",), True),
        ("all-gather", ("context",), False),
        ("all-reduce", ("tensor",), False),
    ],
)
def test_parameters_and_gradients_are_told_from_activations(kind, axes, does):
    assert dataclasses.replace(TOKENS, kind=kind, axes=axes).moves_parameters == does


def test_one_device_is_never_bound_by_communication():
    assert "never" in as_text(dataclasses.replace(REPORT, traffic=()))


def test_a_step_fits_up_to_what_the_compiler_grants():
    assert REPORT.fits
    assert not dataclasses.replace(REPORT, memory=Memory(GIB, 0, 15 * GIB, 0)).fits


def test_virtual_devices_have_no_times():
    report = dataclasses.replace(REPORT, topology="cpu:16")
    assert report.fits
    assert json.loads(json.dumps(report.to_dict(), allow_nan=False))["compute_seconds"] is None
    assert "at peak" not in as_text(report)


def test_what_is_not_counted_is_said():
    report = dataclasses.replace(REPORT, unread={"arithmetic of splash_mha_fwd": 24})
    assert "not counted, as it is not known: arithmetic of splash_mha_fwd (24 runs)" in as_text(report)
    assert "not counted" not in as_text(REPORT)
    assert from_dict(json.loads(json.dumps(report.to_dict()))) == report


def test_a_step_in_which_nothing_could_be_read_has_a_report():
    report = dataclasses.replace(REPORT, compiled_flops=0.0, hbm_traffic=0.0, traffic=())
    assert "0.0% if none overlaps" in as_text(report)
    assert report.to_dict()["communication_share"] == 0.0


def test_a_report_survives_json():
    assert from_dict(json.loads(json.dumps(REPORT.to_dict()))) == REPORT
