"""Arithmetic and memory traffic of compiled programs, against counts by hand and XLA's own."""

import collections

import pytest

from topklm.compile_check import cost
from topklm.compile_check.cost import parse

# By hand, from the docstring of the function: 2 x rows x inner x columns for each product.
LOOPED = 2 * 16 * 32 * 32
BATCHED = 8 * 2 * 4 * 32 * 16


def test_products_in_a_loop_count_as_often_as_it_turns(compiled):
    assert cost.matmul_flops(parse(compiled["products"])) == 6 * LOOPED + BATCHED


def test_xla_counts_the_body_of_a_loop_once(compiled):
    """Shows why the count is ours; the products differ from XLA's only by its elementwise operations."""
    elementwise = 20_000
    once = LOOPED + BATCHED
    assert once <= compiled["flops"] <= once + elementwise < 6 * LOOPED + BATCHED


# As a TPU writes a batch of 16 x 12 products [128, 64] x [64, 896]: the batch is a dilated window.
CONVOLUTIONS = """HloModule made

ENTRY %main (a: f32[16,12,128,64], b: f32[16,12,896,64], c: f32[64,32], d: f32[32,8]) -> f32[64,8] {
  %a = f32[16,12,128,64]{3,2,1,0} parameter(0)
  %b = f32[16,12,896,64]{3,2,1,0} parameter(1)
  %c = f32[64,32]{1,0} parameter(2)
  %d = f32[32,8]{1,0} parameter(3)
  %many = f32[16,12,128,896]{3,2,1,0:T(8,128)S(1)} convolution(%a, %b), \
window={size=16x12 stride=15x11 lhs_dilate=16x12}, dim_labels=01bf_01oi->01bf
  ROOT %one = f32[64,8]{1,0} convolution(%c, %d), dim_labels=bf_io->bf
}
"""


def test_a_product_written_as_a_convolution_costs_what_the_product_costs():
    assert cost.matmul_flops(parse(CONVOLUTIONS)) == 16 * 12 * 2 * 128 * 64 * 896 + 2 * 64 * 32 * 8


SPLASH = """HloModule made

ENTRY %main (m: s8[1,3,3], q: bf16[2,4,768,64], k: bf16[2,2,768,64]) -> bf16[2,4,768,64] {
  %m = s8[1,3,3]{2,1,0} parameter(0)
  %q = bf16[2,4,768,64]{3,2,1,0} parameter(1)
  %k = bf16[2,2,768,64]{3,2,1,0} parameter(2)
  ROOT %splash_mha_fwd_segmented.1 = bf16[2,4,768,64]{3,2,1,0} custom-call(%m, %q, %k, %k), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"xprof_metadata":"{}"
}}, metadata={op_name="jit(step)/pallas_call"}
}
"""


def test_a_kernel_of_splash_attention_does_the_blocks_on_and_under_the_diagonal():
    blocks = 3 + 2 + 1  # of 256 x 256 tokens
    assert cost.matmul_flops(parse(SPLASH)) == 2 * 4 * blocks * 2 * (2 * 256 * 256 * 64)


@pytest.mark.parametrize("role", ["fwd_segmented_residuals", "dq_no_residuals", "dkv_segmented"])
def test_a_device_of_one_sequence_or_one_head_has_kernels_of_fewer_dims(role):
    """As TPUs write them: the batch dim of one is left out, and two arrays describe the mask."""
    mask, of = "s8[1,1,1]{2,1,0}", "f32[4,256,64]{2,1,0}"
    text = f"""HloModule made

ENTRY %main (m: s8[1,1,1], q: f32[4,256,64], s: s32[256,128]) -> f32[4,256,64] {{
  %m = {mask} parameter(0)
  %q = {of} parameter(1)
  %s = s32[256,128]{{1,0}} parameter(2)
  ROOT %splash_mha_{role}.8 = (f32[256,64]{{1,0}}, {of}) custom-call(%m, %m, %q, %q, /*index=4*/%q, %s), \
custom_call_target="tpu_custom_call"
}}
"""
    products = {"fwd": 2, "dq_": 3, "dkv": 4}[role[:3]]
    assert cost.matmul_flops(parse(text)) == 4 * products * (2 * 256 * 256 * 64)
    heads = text.replace("[4,256,64]{2,1,0}", "[2,1,256,64]{3,2,1,0}").replace("[4,256,64]", "[2,1,256,64]")
    assert cost.matmul_flops(parse(heads)) == 2 * products * (2 * 256 * 256 * 64)


UNREADABLE = """HloModule made, num_partitions=4

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0} dot(%x, %x), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %t = (s32[], f32[8,8]{1,0}) tuple(%i, %y)
}

%until (p: (s32[], f32[8,8])) -> pred[] {
  %p = (s32[], f32[8,8]{1,0}) parameter(0)
  %x = f32[8,8]{1,0} get-tuple-element(%p), index=1
  ROOT %converged = pred[] custom-call(%x), custom_call_target="Converged"
}

ENTRY %main (x: f32[8,8]) -> f32[8,8] {
  %x = f32[8,8]{1,0} parameter(0)
  %zero = s32[] constant(0)
  %t = (s32[], f32[8,8]{1,0}) tuple(%zero, %x)
  %loop = (s32[], f32[8,8]{1,0}) while(%t), condition=%until, body=%body
  %y = f32[8,8]{1,0} get-tuple-element(%loop), index=1
  %splash_mha_fwd.3 = f32[8,8]{1,0} custom-call(%y), custom_call_target="tpu_custom_call"
  %gemm.1 = f32[8,8]{1,0} custom-call(%y, %y), custom_call_target="__cublas$lt$matmul"
  %conv.2 = f32[8,8]{1,0} convolution(%y, %y), window={}
  %odd.9 = f32[8,8]{1,0} all-reduce(%conv.2), replica_groups=<a new notation>, to_apply=%until
  %known = f32[8,8]{1,0} dot(%y, %y), lhs_contracting_dims={1}, rhs_contracting_dims={0}
  ROOT %sum = f32[8,8]{1,0} add(%known, %odd.9)
}
"""


def test_products_that_cannot_be_read_are_named_and_the_others_counted():
    unread = collections.Counter()
    product = 2 * 8 * 8 * 8
    assert cost.matmul_flops(parse(UNREADABLE), unread) == 2 * product  # the loop's for one turn
    assert unread == {"splash_mha_fwd": 1, "gemm": 1, "conv": 1, "y in a loop of unknown length": 1}
    with pytest.raises((ValueError, StopIteration)):
        cost.matmul_flops(parse(UNREADABLE))


def test_collectives_that_cannot_be_read_are_named():
    unread = collections.Counter()
    assert cost.collectives(parse(UNREADABLE), unread) == []
    assert unread == {"odd": 1}


def test_the_traffic_of_what_cannot_be_read_is_named():
    unread = collections.Counter()
    fusion = SLICED.replace("calls=%add_slice", "calls=%add_slice, calls=%increment")
    assert 0 < cost.main_memory_bytes(parse(fusion), unread) < cost.main_memory_bytes(parse(SLICED))
    # With it the length of the loop is unknown, too.
    assert unread == {"h": 1, "body, a loop of unknown length": 1, "goes_on, a loop of unknown length": 1}


def test_traffic_counts_main_memory_only():
    operands = 4 * (16 * 12 * (128 + 896) * 64 + 64 * 32 + 32 * 8)
    assert cost.main_memory_bytes(parse(CONVOLUTIONS)) == operands + 4 * 64 * 8  # %many stays on the chip


SLICED = """HloModule made

%body (p: (s32[], f32[10,256], f32[256])) -> (s32[], f32[10,256], f32[256]) {
  %p = (s32[], f32[10,256]{1,0}, f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %stack = f32[10,256]{1,0} get-tuple-element(%p), index=1
  %h = f32[256]{0} get-tuple-element(%p), index=2
  %one = s32[] constant(1)
  %next = s32[] fusion(%i, %one), kind=kLoop, calls=%increment
  %h.1 = f32[256]{0} fusion(%stack, %i, %h), kind=kLoop, calls=%add_slice
  ROOT %t = (s32[], f32[10,256]{1,0}, f32[256]{0}) tuple(%next, %stack, %h.1)
}

%increment (i: s32[], one: s32[]) -> s32[] {
  %i = s32[] parameter(0)
  %one = s32[] parameter(1)
  ROOT %sum = s32[] add(%i, %one)
}

%add_slice (stack: f32[10,256], i: s32[], h: f32[256]) -> f32[256] {
  %stack = f32[10,256]{1,0} parameter(0)
  %i = s32[] parameter(1)
  %h = f32[256]{0} parameter(2)
  %zero = s32[] constant(0)
  %slice = f32[1,256]{1,0} dynamic-slice(%stack, %i, %zero), dynamic_slice_sizes={1,256}
  %row = f32[256]{0} bitcast(%slice)
  ROOT %sum = f32[256]{0} add(%h, %row)
}

%goes_on (p: (s32[], f32[10,256], f32[256])) -> pred[] {
  %p = (s32[], f32[10,256]{1,0}, f32[256]{0}) parameter(0)
  %i = s32[] get-tuple-element(%p), index=0
  %end = s32[] constant(10)
  ROOT %less = pred[] compare(%i, %end), direction=LT
}

ENTRY %main (stack: f32[10,256], h: f32[256]) -> (s32[], f32[10,256], f32[256]) {
  %stack = f32[10,256]{1,0} parameter(0)
  %h = f32[256]{0} parameter(1)
  %zero = s32[] constant(0)
  %t = (s32[], f32[10,256]{1,0}, f32[256]{0}) tuple(%zero, %stack, %h)
  ROOT %loop = (s32[], f32[10,256]{1,0}, f32[256]{0}) while(%t), condition=%goes_on, body=%body
}
"""


def test_a_loop_over_slices_reads_the_slices():
    """Finds the trip count by running the counter, as there is no annotation."""
    rows = 3 * 256 * 4  # a slice and h read, h written
    counter = 4 + 3 * 4 + (4 + 4 + 1)  # where to slice; i, 1 and i + 1; i, 10 and whether it is less
    assert cost.main_memory_bytes(parse(SLICED)) == 10 * (rows + counter)
