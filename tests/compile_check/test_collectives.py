"""Collectives read from compiled programs, against sizes counted by hand."""

import pytest

from topklm.compile_check import cost

MESH = {"data": 2, "fsdp": 4}
ARRAY = 64 * 128 * 4  # float32[64, 128], on every device


def found_in(text):
    return cost.collectives(cost.parse(text))


def only(text):
    [collective] = found_in(text)
    return collective


def test_an_all_reduce_has_the_size_of_its_operand_and_the_axis_of_its_groups(compiled):
    found = only(compiled["all_reduce"])
    assert (found.kind, found.bytes, found.count, found.group_size) == ("all-reduce", ARRAY, 1, 2)
    assert found.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert found.axes(MESH) == ("data",)
    assert found.bytes_sent == ARRAY  # twice one half


def test_a_collective_in_a_scan_of_five_counts_five_times(compiled):
    found = only(compiled["gather_in_a_scan_of_five"])
    assert (found.kind, found.count, found.is_exact) == ("all-gather", 5, True)
    assert found.bytes == 4 * 64 * 4  # four parts of float32[64]
    assert found.axes(MESH) == ("fsdp",)
    assert found.bytes_sent == found.bytes * 3 / 4


def test_loops_in_loops_multiply(compiled):
    found = only(compiled["scatter_in_a_scan_of_three_in_a_scan_of_five"])
    assert (found.kind, found.count, found.bytes) == ("reduce-scatter", 15, ARRAY)
    assert found.bytes_sent == ARRAY * 3 / 4


def test_exchanges_are_told_apart(compiled):
    found = {collective.kind: collective for collective in found_in(compiled["exchange"])}
    assert set(found) == {"all-to-all", "collective-permute"}
    assert {c.axes(MESH) for c in found.values()} == {("fsdp",)}
    assert found["collective-permute"].bytes == found["collective-permute"].bytes_sent == ARRAY
    assert found["all-to-all"].bytes == ARRAY
    assert found["all-to-all"].bytes_sent == ARRAY * 3 / 4


def test_a_loop_that_depends_on_data_is_counted_once_and_said_to_be(compiled):
    found = only(compiled["reduce_until_small"])
    assert (found.count, found.is_exact) == (1, False)
    assert found.axes(MESH) == ("data", "fsdp")


def program_with(instruction, header="num_partitions=8"):
    return f"""HloModule made, {header}

ENTRY %main (x: f32[16]) -> f32[16] {{
  %x = f32[16]{{0}} parameter(0)
  {instruction}
}}
"""


@pytest.mark.parametrize(
    ("notation", "groups"),
    [
        ("{{0,1,2,3},{4,5,6,7}}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("{}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("[4,2]<=[8]", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("[2,4]<=[4,2]T(1,0)", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("[4,2]<=[2,2,2]T(0,2,1)", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b'}", ((0, 1, 2, 3), (4, 5, 6, 7))),
        ("mesh['a'=2,'b'=4] {'a','b'}", ((0, 1, 2, 3, 4, 5, 6, 7),)),
        ("mesh['a'=2,'b'=4] {'b':(1)2}", ((0, 2), (1, 3), (4, 6), (5, 7))),
        ("mesh['a'=2,'b'=4] {'b':(2)2}", ((0, 1), (2, 3), (4, 5), (6, 7))),
        ("mesh['a'=2,'b'=2], device_ids=(0,2,1,3) {'b'}", ((0, 2), (1, 3))),
        ("mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}", ((0, 2, 4, 6), (1, 3, 5, 7))),
        ("@mesh<a=2,b=4> {b}", ((0, 1, 2, 3), (4, 5, 6, 7))),
    ],
)
def test_every_notation_of_groups_is_read(notation, groups):
    line = f"ROOT %r = f32[16]{{0}} all-reduce(%x), channel_id=1, replica_groups={notation}, to_apply=%sum"
    assert only(program_with(line)).groups == groups


def test_groups_in_an_unknown_notation_are_not_guessed():
    line = "ROOT %r = f32[16]{0} all-reduce(%x), replica_groups=<new>, to_apply=%sum"
    with pytest.raises(ValueError, match="unknown notation"):
        found_in(program_with(line))


def test_a_start_and_its_done_are_one_collective():
    lines = """%s = (f32[2]{0}, f32[16]{0}) all-gather-start(%x), replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %d = f32[16]{0} all-gather-done(%s)"""
    found = only(program_with(lines))
    assert (found.kind, found.bytes) == ("all-gather", 8 * 16 * 4)


def test_groups_of_one_device_do_not_count():
    line = "ROOT %r = f32[16]{0} all-reduce(%x), replica_groups=[8,1]<=[8], to_apply=%sum"
    assert found_in(program_with(line)) == []


TPU_PROGRAM = """HloModule made, num_partitions=4

%all-reduce-scatter.1 (p: f32[8]) -> f32[2] {
  %p = f32[8]{0} parameter(0)
  %all-reduce.1 = f32[8]{0:T(128)} all-reduce(%p), replica_groups={{0,1,2,3}}, to_apply=%sum
  %place = s32[] partition-id()
  ROOT %slice = f32[2]{0} dynamic-slice(%all-reduce.1, %place), dynamic_slice_sizes={2}
}

%starts (p: bf16[4,2]) -> (bf16[4,2], bf16[4,8]) {
  %p = bf16[4,2]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[4,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={1}, \
backend_config={"async_collective_fusion_config":{"flag_start":"-1","flag_end":"-1"}}
  ROOT %start = (bf16[4,2]{1,0}, bf16[4,8]{1,0}) custom-call(%all-gather.1), \
custom_call_target="AsyncCollectiveStart"
}

%goes_on (p: bf16[4,2]) -> (bf16[4,8], bf16[4,4]) {
  %p = bf16[4,2]{1,0} parameter(0)
  %all-gather.2 = bf16[4,8]{1,0} all-gather(%p), replica_groups={{0,1,2,3}}, dimensions={1}, \
backend_config={"async_collective_fusion_config":{"flag_start":"2","flag_end":"8"}}
  %product = bf16[4,4]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf
  ROOT %both = (bf16[4,8]{1,0}, bf16[4,4]{1,0}) tuple(%all-gather.2, %product)
}

ENTRY %main (x: f32[8], w: bf16[4,2]) -> f32[2] {
  %x = f32[8]{0} parameter(0)
  %w = bf16[4,2]{1,0} parameter(1)
  %one = (bf16[4,2]{1,0}, bf16[4,8]{1,0}) fusion(%w), kind=kCustom, calls=%starts
  %two = (bf16[4,8]{1,0}, /*index=1*/bf16[4,4]{1,0}) fusion(%w), kind=kOutput, calls=%goes_on
  ROOT %sum.1 = f32[2]{0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_a_tpu_collective_that_is_spread_over_fusions_counts_once():
    kinds = sorted((c.kind, c.bytes, c.count) for c in found_in(TPU_PROGRAM))
    assert kinds == [("all-gather", 4 * 8 * 2, 1), ("reduce-scatter", 32, 1)]


def test_what_goes_to_other_slices_is_read_from_the_transfer_to_the_host():
    line = """%t = token[] after-all()
  %s = (f32[16]{0}, u32[], token[]) send(%x, %t), channel_id=2, is_host_transfer=true, \
frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",\
_xla_megascale_target="{1,2,3,4}x{0:7}",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %r = f32[16]{0} all-reduce(%x), replica_groups={{0,2},{1,3},{4,6},{5,7}}, to_apply=%sum"""
    between, within = found_in(program_with(line))
    assert (between.kind, between.bytes, between.group_size, between.across_slices) == (
        "all-reduce",
        64,
        4,
        True,
    )
    assert between.bytes_sent == 2 * 64 * 3 / 4
    # Of 4 slices of 8 devices: within one, data has one device only.
    mesh = {"data": 4, "fsdp": 4, "tensor": 2}
    assert between.axes(mesh) == ("data",)
    assert within.axes(mesh) == ("fsdp",)
