"""The reader of compiled programs, on programs whose collectives are known."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from caat_jax.communication import compiled_programs
from caat_jax.communication.compiled_programs import CompiledCollective

ROWS = ((0, 1, 2, 3), (4, 5, 6, 7))  # of a mesh 2 x 4, over its second axis
COLUMNS = ((0, 4), (1, 5), (2, 6), (3, 7))


def compiled_text(function, *shapes, in_specs, out_specs):
    """The compiled text of a function under `shard_map` on a mesh (x 2, y 4)."""
    mesh = Mesh(np.array(jax.devices()).reshape(2, 4), ("x", "y"))
    mapped = jax.shard_map(function, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    arguments = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return jax.jit(mapped).lower(*arguments).compile().as_text()


def found(text):
    """(kind, groups, arrays, times) of each, sorted; nothing may be left not understood."""
    reading = compiled_programs.read(text)
    assert reading.unrecognised == ()
    return sorted((c.kind, c.groups, c.arrays, c.times) for c in reading.collectives)


def one(kind, groups, shape, times, dtype="float32"):
    return (kind, groups, ((dtype, shape),), times)


def test_kinds_payloads_and_groups():
    def function(a):  # [4, 8] of [8, 32]
        gathered = lax.all_gather(a, "x", axis=0, tiled=True)
        scattered = lax.psum_scatter(jnp.sin(gathered), "y", scatter_dimension=1, tiled=True)
        moved = lax.ppermute(scattered, "x", [(0, 1), (1, 0)])
        exchanged = lax.all_to_all(jnp.cos(a), "y", split_axis=1, concat_axis=0, tiled=True)
        return lax.pmax(jnp.sum(moved) + jnp.sum(exchanged), ("x", "y"))

    text = compiled_text(function, (8, 32), in_specs=P("x", "y"), out_specs=P())
    pairs = ((0, 4), (1, 5), (2, 6), (3, 7), (4, 0), (5, 1), (6, 2), (7, 3))
    kinds = {c.kind: c for c in compiled_programs.read(text).collectives}
    assert kinds["all-gather"].arrays == (("float32", (8, 8)),)
    assert kinds["all-gather"].groups == COLUMNS
    assert kinds["reduce-scatter"].arrays == (("float32", (8, 8)),)
    assert kinds["reduce-scatter"].groups == ROWS
    assert kinds["collective-permute"].arrays == (("float32", (8, 2)),)
    assert sorted(kinds["collective-permute"].groups) == sorted(pairs)
    assert sum(np.prod(shape) for _, shape in kinds["all-to-all"].arrays) == 32
    assert kinds["all-reduce"].groups == (tuple(range(8)),)
    assert kinds["all-reduce"].arrays == (("float32", ()),)
    assert len(kinds) == len(compiled_programs.read(text).collectives) == 5


def test_loops_in_loops():
    def function(a):
        def inner(x, _):
            return lax.psum(jnp.sin(x), "y") * 0.5, None

        def outer(x, _):
            x, _ = lax.scan(inner, x, length=5)
            return jnp.cos(lax.pcast(lax.psum(x, "x"), "x", to="varying")), None

        x, _ = lax.scan(outer, a, length=3)
        return x

    def varying(a):
        return function(lax.pcast(a, "x", to="varying"))

    text = compiled_text(varying, (4, 8), in_specs=P(), out_specs=P("x"))
    assert found(text) == sorted(
        [one("all-reduce", ROWS, (4, 8), 15), one("all-reduce", COLUMNS, (4, 8), 3)]
    )


def test_combined_reductions_are_one_operation():
    def function(a, b):
        return lax.psum((a, jnp.sum(b, axis=0)), "y")

    specs = (P("x", "y"), P("x", "y"))
    text = compiled_text(function, (4, 8), (4, 8), in_specs=specs, out_specs=(P("x"), P("x")))
    (operation,) = compiled_programs.read(text).collectives
    assert sorted(operation.arrays) == [("float32", (2,)), ("float32", (2, 2))]


def test_groups_of_one_device_are_left_out():
    mesh = Mesh(np.array(jax.devices()).reshape(8, 1), ("x", "y"))
    mapped = jax.shard_map(
        lambda a: lax.psum(a, "y"), mesh=mesh, in_specs=P("x", "y"), out_specs=P("x")
    )
    argument = jax.ShapeDtypeStruct((8, 8), jnp.float32)
    assert found(jax.jit(mapped).lower(argument).compile().as_text()) == []


def module(entry, *computations):
    """An HLO module of 8 devices around the lines of its entry computation."""
    sum_ = """%sum (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %add = f32[] add(%a, %b)
}"""
    body = "\n".join(f"  {line}" for line in entry)
    return "\n\n".join(
        [
            "HloModule m, is_scheduled=true, num_partitions=8",
            sum_,
            *computations,
            "ENTRY %main (p: f32[4,8]) -> f32[4,8] {\n  %p = f32[4,8]{1,0:T(8,128)} parameter(0)\n"
            f"{body}\n}}",
        ]
    )


ALL_REDUCE = "all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%sum"


@pytest.mark.parametrize(
    "written, groups",
    [
        ("{{0,1,2,3},{4,5,6,7}}", ROWS),
        ("{}", (tuple(range(8)),)),
        ("[2,4]<=[8]", ROWS),
        ("[4,2]<=[2,4]T(1,0)", COLUMNS),
        ("mesh['a'=2,'b'=4] {'b'}", ROWS),
        ("mesh['a'=2,'b'=4] {'a'}", COLUMNS),
        ("mesh['a'=4,'b'=2], device_ids=([2,4]T(1,0)) {'b'}", COLUMNS),
        ("mesh['a'=2,'b'=2,'c'=2] {'b','c'}", ROWS),
    ],
)
def test_every_way_to_write_groups(written, groups):
    line = f"ROOT %r = f32[4,8]{{1,0}} {ALL_REDUCE.format(groups=written)}"
    assert found(module([line])) == [one("all-reduce", groups, (4, 8), 1)]


def test_start_and_done_with_what_runs_between():
    text = module(
        [
            "%s = (f32[4,8]{1,0}, f32[8,8]{1,0}) all-gather-start(%p), replica_groups={{0,4},"
            '{1,5},{2,6},{3,7}}, dimensions={0}, metadata={op_name="jit(f)/layers/x"}',
            "%d = f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}",
            "%e = f32[4,4]{1,0} exponential(%d)",
            "%g = f32[8,8]{1,0} all-gather-done(%s)",
            "%n = f32[4,4]{1,0} negate(%e)",
            "ROOT %r = f32[4,8]{1,0} slice(%g), slice={[0:4], [0:8]}",
        ]
    )
    assert compiled_programs.read(text).collectives == (
        CompiledCollective(
            "all-gather",
            COLUMNS,
            (("float32", (8, 8)),),
            1,
            "jit(f)/layers/x",
            True,
            ("matrix product", "exponential"),
            2 * (4 * 4) * 8,  # of the product [4, 8] x [8, 4]
        ),
    )


def test_operation_wrapped_in_an_asynchronous_one():
    wrapped = """%wrapped (q: bf16[8,8]) -> f32[2,8] {
  %q = bf16[8,8]{1,0} parameter(0)
  ROOT %rs = f32[2,8] reduce-scatter(%q), replica_groups=[2,4]<=[8], dimensions={0}, to_apply=%sum
}"""
    text = module(
        [
            "%s = ((bf16[8,8]), f32[2,8], u32[]) async-start(%p), calls=%wrapped",
            "%u = ((bf16[8,8]), f32[2,8], u32[]) async-update(%s)",
            "%n = f32[4,8]{1,0} negate(%p)",
            "%d = f32[2,8]{1,0} async-done(%u)",
            "ROOT %r = f32[4,8]{1,0} copy(%n)",
        ],
        wrapped,
    )
    (operation,) = compiled_programs.read(text).collectives
    assert (operation.kind, operation.groups) == ("reduce-scatter", ROWS)
    assert operation.arrays == (("float32", (8, 8)),)  # sent in the type of the sum
    assert operation.asynchronous and "negate" in operation.between


def test_operation_on_another_thread_of_a_tpu():
    """Offloaded to a SparseCore, as XLA writes it."""
    called = """%called (q: f32[4,8], t: token[]) -> f32[4,8] {
  %t = token[] parameter(1)
  %q = f32[4,8]{1,0} parameter(0)
  ROOT %ar = f32[4,8]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%sum
}, execution_thread="sparsecore\""""
    text = module(
        [
            '%i = s32[]{:S(2)} custom-call(), custom_call_target="PrepareAsyncCallStart"',
            '%t = token[] custom-call(%i), custom_call_target="PrepareAsyncCallDone"',
            "%s = ((f32[4,8]{1,0}, token[]), f32[4,8]{1,0}) call-start(%p, %t),"
            ' async_execution_thread="sparsecore", to_apply=%called',
            "%d = f32[4,4]{1,0} convolution(%p, %p), dim_labels=bf_oi->bf",
            "%r = f32[4,8]{1,0} call-done(%s)",
            "ROOT %o = f32[4,8]{1,0} copy(%r)",
        ],
        called,
    )
    reading = compiled_programs.read(text)
    (operation,) = reading.collectives
    assert (operation.kind, operation.groups, operation.times) == ("all-reduce", ROWS, 1)
    assert operation.asynchronous and operation.overlapped_flops == 2 * (4 * 4) * 8
    assert reading.unrecognised == ()


def test_reduce_scatter_of_a_gpu():
    text = module(
        [
            "%s = ((f32[4,8]{1,0}), f32[4,2]{1,0}) reduce-scatter-start(%p),"
            " replica_groups=[2,4]<=[8], dimensions={1}, to_apply=%sum",
            "%d = f32[4,2]{1,0} reduce-scatter-done(%s)",
            "ROOT %r = f32[4,8]{1,0} copy(%p)",
        ]
    )
    assert found(text) == [one("reduce-scatter", ROWS, (4, 8), 1)]


CUBLAS = '{"gemm_backend_config":{"dot_dimension_numbers":{"lhs_contracting_dimensions":["2"]}}}'


@pytest.mark.parametrize(
    "operands, line, flops",
    [
        # Batched, the batch being the window's axis, and its elements taken in reversed order.
        (
            "bf16[4,16,64] bf16[4,64,32]",
            "bf16[4,16,32] convolution({}), window={{size=4 stride=3 pad=0_0 lhs_dilate=4}},"
            " dim_labels=0bf_0io->0bf",
            2 * 4 * 16 * 64 * 32,
        ),
        # Two axes contracted, one of them the window's.
        (
            "bf16[8,16,4] bf16[4,32,8]",
            "bf16[1,16,32] convolution({}), window={{size=4}}, dim_labels=fb0_0oi->0bf",
            2 * 16 * (8 * 4) * 32,
        ),
        # A window that shifts over zeros: one place has an input.
        (
            "bf16[8,16,1] bf16[4,32,8]",
            "bf16[16,32,4] convolution({}), window={{size=4 pad=3_3 rhs_reversal=1}},"
            " dim_labels=fb0_0oi->bf0",
            2 * 16 * 32 * 8 * 4,
        ),
        (
            "f32[3,4,5] f32[3,5,6]",
            '(f32[3,4,6], s8[99]) custom-call({}), custom_call_target="__cublas$gemm",'
            f" backend_config={CUBLAS.replace('{', '{{').replace('}', '}}')}",
            2 * 3 * 4 * 5 * 6,
        ),
        # Causal attention: half of two products of [T, S] by the heads' width.
        (
            "bf16[2,128,4,64] bf16[2,256,4,64] bf16[2,256,4,64]",
            '(bf16[2,4,128,64], u8[0]) custom-call({}), custom_call_target="__cudnn$fmhaSoftmax"',
            2 * (2 * 2 * 4 * 128 * 256 * 64) / 2,
        ),
        (
            "bf16[2,128,4,64] bf16[2,256,4,64] bf16[2,256,4,64]",
            "(bf16[2,4,128,64], u8[0]) custom-call({}),"
            ' custom_call_target="__cudnn$fmhaSoftmaxBackward"',
            5 * (2 * 2 * 4 * 128 * 256 * 64) / 2,
        ),
        ("f32[4,8]", 'f32[4,8] custom-call({}), custom_call_target="TopK"', 0),
    ],
)
def test_flops_between_start_and_done(operands, line, flops):
    shapes = operands.split()
    names = ", ".join(f"%o{n}" for n in range(len(shapes)))
    text = module(
        [
            *(f"%o{n} = {shape} broadcast(%p)" for n, shape in enumerate(shapes)),
            "%s = f32[4,8]{1,0} all-reduce-start(%p), replica_groups={}, to_apply=%sum",
            f"%x = {line.format(names)}",
            "%d = f32[4,8]{1,0} all-reduce-done(%s)",
            "ROOT %r = f32[4,8]{1,0} copy(%d)",
        ]
    )
    (operation,) = compiled_programs.read(text).collectives
    assert operation.overlapped_flops == flops
    assert operation.between == ("matrix product" if flops else "custom-call",)


def test_product_beside_two_operations_is_shared_by_those_over_the_same_links():
    """Three run at once, two of them over rows, one over pairs; each has a product alone, too."""
    rows, pairs = "replica_groups=[2,4]<=[8]", "replica_groups=[4,2]<=[8]"
    product = "= f32[4,4]{1,0} dot(%p, %p), lhs_contracting_dims={1}, rhs_contracting_dims={1}"
    text = module(
        [
            f"%a = f32[4,8]{{1,0}} all-reduce-start(%p), {rows}, to_apply=%sum",
            f"%x {product}",
            f"%b = f32[4,8]{{1,0}} all-reduce-start(%p), {rows}, to_apply=%sum",
            f"%c = f32[4,8]{{1,0}} all-reduce-start(%p), {pairs}, to_apply=%sum",
            f"%y {product}",
            "%e = f32[4,8]{1,0} all-reduce-done(%a)",
            f"%z {product}",
            "%f = f32[4,8]{1,0} all-reduce-done(%b)",
            "%g = f32[4,8]{1,0} all-reduce-done(%c)",
            "ROOT %r = f32[4,8]{1,0} copy(%e)",
        ]
    )
    one = 2 * (4 * 4) * 8
    flops = [operation.overlapped_flops for operation in compiled_programs.read(text).collectives]
    assert flops == [one * 1.5, one * 1.5, one * 2]


def test_chain_of_fusions_is_one_operation():
    def step(name, root):
        return (
            f"%{name} (q: f32[4,8]) -> f32[8,8] {{\n  %q = f32[4,8]{{1,0}} parameter(0)\n"
            "  %ag = f32[8,8]{1,0} all-gather(%q), replica_groups={{0,4},{1,5},{2,6},{3,7}},"
            f' dimensions={{0}}, frontend_attributes={{chain_id="3"}}\n  ROOT %o = {root}\n}}'
        )

    text = module(
        [
            "%start = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%begin",
            "%f = f32[8,8]{1,0} fusion(%start), kind=kOutput, calls=%beside",
            "%t = f32[4,8]{1,0} tanh(%p)",
            "%end = f32[8,8]{1,0} fusion(%f), kind=kCustom, calls=%finish",
            "ROOT %r = f32[4,8]{1,0} copy(%t)",
        ],
        step("begin", "f32[8,8]{1,0} copy(%ag)"),
        step("beside", "f32[4,4]{1,0} convolution(%q, %q), dim_labels=bf_oi->bf"),
        step("finish", "f32[8,8]{1,0} copy(%ag)"),
    )
    (operation,) = compiled_programs.read(text).collectives
    assert (operation.kind, operation.times, operation.asynchronous) == ("all-gather", 1, True)
    assert operation.between == ("matrix product", "tanh")


def test_fusion_in_two_chains():
    gather = "%{0} = f32[8,8]{{1,0}} all-gather(%q), replica_groups=[4,2]<=[2,4]T(1,0),"
    gather += ' dimensions={{0}}, frontend_attributes={{chain_id="{1}"}}'
    both = f"""%both (q: f32[4,8]) -> f32[8,8] {{
  %q = f32[4,8]{{1,0}} parameter(0)
  {gather.format("a", 3)}
  {gather.format("b", 4)}
  ROOT %o = f32[8,8]{{1,0}} add(%a, %b)
}}"""
    lines = [
        "%f = f32[8,8]{1,0} fusion(%p), kind=kCustom, calls=%both",
        "%g = f32[8,8]{1,0} fusion(%f), kind=kCustom, calls=%both",
        "ROOT %r = f32[4,8]{1,0} copy(%p)",
    ]
    assert found(module(lines, both)) == [one("all-gather", COLUMNS, (8, 8), 1)] * 2


def test_reduce_scatter_as_a_fusion_named_after_what_it_reads():
    text = module(
        [
            '%n = f32[4,8]{1,0} negate(%p), metadata={op_name="jit(f)/embedding/scatter"}',
            "%c = f32[4,8]{1,0} copy(%n)",
            "ROOT %r = f32[1,8]{1,0} fusion(%c), kind=kCustom, calls=%all-reduce-scatter.2",
        ],
        """%all-reduce-scatter.2 (q: f32[4,8]) -> f32[1,8] {
  %q = f32[4,8]{1,0} parameter(0)
  %a = f32[4,8]{1,0} all-reduce(%q), replica_groups=[2,4]<=[8], to_apply=%sum
  ROOT %o = f32[1,8]{1,0} slice(%a), slice={[0:1], [0:8]}
}""",
    )
    (operation,) = compiled_programs.read(text).collectives
    assert (operation.kind, operation.groups) == ("reduce-scatter", ROWS)
    assert operation.arrays == (("float32", (4, 8)),)
    assert operation.name == "jit(f)/embedding/scatter"


def test_reduction_between_tpu_slices():
    handler = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale'
        '_runtime",_xla_megascale_target="{1,2}x{0:3}",_xla_megascale_transfer_type="ALL_REDUCE"}'
    )
    lines = [
        "%t = token[] after-all()",
        f"%s = (f32[4,8]{{1,0}}, u32[], token[]) send(%p, %t), channel_id=3, {handler}",
        f"%v = (f32[4,8]{{1,0}}, u32[], token[]) recv(%t), channel_id=2, {handler}",
        "%n = f32[4,8]{1,0} negate(%p)",
        f"%sd = token[] send-done(%s), channel_id=3, {handler}",
        f"%vd = (f32[4,8]{{1,0}}, token[]) recv-done(%v), channel_id=2, {handler}",
        "ROOT %r = f32[4,8]{1,0} get-tuple-element(%vd), index=0",
    ]
    (operation,) = compiled_programs.read(module(lines)).collectives
    assert (operation.kind, operation.arrays) == ("all-reduce", (("float32", (4, 8)),))
    assert operation.groups == ((0, 4), (1, 5), (2, 6), (3, 7))
    assert operation.asynchronous and "negate" in operation.between
    lines[1] = lines[1].replace("ALL_REDUCE", "ALL_TO_ALL")
    reading = compiled_programs.read(module(lines))
    assert reading.collectives == ()
    assert reading.unrecognised == ("s: a transfer between slices",)


def loop(condition, first="%zero", step="%one"):
    """A module with a loop that counts from `first` by `step`, with an all-reduce in it."""
    body = f"""%body (t: (s32[], f32[4,8], s32[])) -> (s32[], f32[4,8], s32[]) {{
  %t = (s32[], f32[4,8]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %x = f32[4,8]{{1,0}} get-tuple-element(%t), index=1
  %n = s32[] get-tuple-element(%t), index=2
  %one = s32[] constant(2)
  %j = s32[] add(%i, {step})
  %y = f32[4,8]{{1,0}} all-reduce(%x), replica_groups={{}}, to_apply=%sum
  ROOT %u = (s32[], f32[4,8]{{1,0}}, s32[]) tuple(%j, %y, %n)
}}"""
    test = f"""%test (t: (s32[], f32[4,8], s32[])) -> pred[] {{
  %t = (s32[], f32[4,8]{{1,0}}, s32[]) parameter(0)
  %i = s32[] get-tuple-element(%t), index=0
  %n = s32[] get-tuple-element(%t), index=2
  %x = s32[] constant(9)
  ROOT %lt = pred[] {condition}
}}"""
    return module(
        [
            "%zero = s32[] constant(1)",
            "%bound = s32[] constant(7)",
            "%a = (s32[], s32[], u32[]) copy-start(%bound)",
            "%c = s32[] copy-done(%a)",
            "%m = s32[] fusion(%p), kind=kLoop, calls=%sum",
            f"%t = (s32[], f32[4,8]{{1,0}}, s32[]) tuple({first}, %p, %c)",
            "%w = (s32[], f32[4,8]{1,0}, s32[]) while(%t), condition=%test, body=%body,"
            ' metadata={op_name="jit(f)/layers/while"}',
            "ROOT %r = f32[4,8]{1,0} get-tuple-element(%w), index=1",
        ],
        body,
        test,
    )


@pytest.mark.parametrize(
    "condition, times",
    [
        ("compare(%i, %x), direction=LT", 4),  # 1, 3, 5, 7
        ("compare(%i, %n), direction=LT", 3),  # the bound, 7, is carried along
    ],
)
def test_iterations_of_a_loop_without_a_note(condition, times):
    assert found(loop(condition)) == [one("all-reduce", (tuple(range(8)),), (4, 8), times)]
    (operation,) = compiled_programs.read(loop(condition)).collectives
    assert operation.name == "jit(f)/layers/while"  # its own would be better; it has none


@pytest.mark.parametrize(
    "text",
    [
        loop("compare(%i, %x), direction=GT"),
        loop("compare(%i, %x), direction=LT", first="%m"),
        loop("compare(%i, %x), direction=LT", step="%n2"),
    ],
)
def test_loop_of_unknown_length_is_reported_and_counted_once(text):
    reading = compiled_programs.read(text.replace("%n2", "%i"))
    assert [c.times for c in reading.collectives] == [1]
    assert reading.unrecognised == ("loop w: how often it runs; counted as once",)


@pytest.mark.parametrize(
    "line, said",
    [
        ("%x = f32[4,8]{1,0} teleport(%p)", "operation teleport"),
        ('%x = f32[4,8] custom-call(%p), custom_call_target="NcclSend"', "NcclSend"),
        ("%x = (f32[4,8], u32[], token[]) send(%p, %p), channel_id=2", "operation send"),
        (f"%x = f32[4,8] {ALL_REDUCE.format(groups='mesh[a]')}", "all-reduce x"),
        (f"%x = f99[4,8] {ALL_REDUCE.format(groups='{}')}", "all-reduce x"),
        ("%x = (f32[4,8], f32[8,8]) all-gather-start(%p), replica_groups={}", "x: where it ends"),
        ("this is no instruction", "this is no instruction"),
    ],
)
def test_what_is_unrecognised_is_said(line, said):
    reading = compiled_programs.read(module([line, "ROOT %r = f32[4,8]{1,0} copy(%p)"]))
    assert [said in problem for problem in reading.unrecognised] == [True]


def test_instruction_over_several_lines():
    text = module(
        [
            '%k = f32[4,8] custom-call(%p), custom_call_target="tpu_custom_call", '
            'frontend_attributes={kernel_metadata={\n"a":"{\\"b\\": 1}"\n}},'
            ' backend_config={"c":"}"}',
            f"ROOT %r = f32[4,8]{{1,0}} {ALL_REDUCE.format(groups='{}')}",
        ]
    )
    assert found(text) == [one("all-reduce", (tuple(range(8)),), (4, 8), 1)]


def test_branches_are_all_counted_and_reported():
    branch = """%{name} (q: f32[4,8]) -> f32[4,8] {{
  %q = f32[4,8]{{1,0}} parameter(0)
  ROOT %o = f32[4,8]{{1,0}} {operation}
}}"""
    text = module(
        [
            "%i = s32[] constant(0)",
            "ROOT %r = f32[4,8] conditional(%i, %p, %p), branch_computations={%b0, %b1}",
        ],
        branch.format(name="b0", operation="negate(%q)"),
        branch.format(name="b1", operation="all-reduce(%q), replica_groups={}, to_apply=%sum"),
    )
    reading = compiled_programs.read(text)
    assert len(reading.collectives) == 1
    assert "which branch runs" in reading.unrecognised[0]


def test_text_of_something_else_is_refused():
    with pytest.raises(ValueError, match=re.escape("no ENTRY")):
        compiled_programs.read("module @jit_f {}")
