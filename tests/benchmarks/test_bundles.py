"""The static analysis against dumps of small kernels whose loops are known.

The kernels in `data/` copy rows of three tables in, do Adam, and copy them back: one
DMA a row and table each way, 64 rows a chunk, 16 chunks.
"""

import re
from pathlib import Path

import pytest

from benchmarks.static.attribution import (
    KernelTotals,
    attribute,
    dmas_per_row,
    mesh_loop,
)
from benchmarks.static.bundles import BundledKernel, parse_tensorcore
from benchmarks.static.programs import find
from benchmarks.static.subcore import parse_subcore

DATA = Path(__file__).parent / "data"


def tensorcore(name: str, delay_slots: int | None) -> BundledKernel:
    text = (DATA / f"{name}.txt").read_text()
    return parse_tensorcore(text, name=name, delay_slots=delay_slots)


def subcore(text: str | None = None, delay_slots: int | None = None) -> BundledKernel:
    if text is None:
        text = (DATA / "subcore_7x.txt").read_text()
    kernel = parse_subcore(text, name="subcore", delay_slots=delay_slots)
    assert kernel is not None
    return kernel


def test_loops_nest_and_trip_counts_are_read() -> None:
    once, chunk, fetch, write = tensorcore("rows_v6e", 4).loops
    assert [loop.depth for loop in (once, chunk, fetch, write)] == [0, 1, 2, 2]
    assert [loop.parent for loop in (once, chunk, fetch, write)] == [None, 0, 1, 1]
    assert [loop.trip_count for loop in (once, chunk, fetch, write)] == [1, 16, 16, 16]
    assert (chunk.innermost, fetch.innermost) == (False, True)


def test_dmas_are_counted_by_direction() -> None:
    kernel = tensorcore("rows_v6e", 4)
    once, chunk, fetch, write = (loop.counts for loop in kernel.loops)
    assert fetch.dma == {"hbm_to_vmem": 12}  # 4 rows of 3 tables
    assert fetch.dma_granules == {"hbm_to_vmem": 12 * 16}
    assert write.dma == {"vmem_to_hbm": 12}
    assert once.dma == {"hbm_to_smem": 1}
    assert (once.waits, chunk.waits) == (1, 2)
    assert kernel.largest_dma == 128  # the ids: 1024 of 4 bytes, in granules of 32


def test_every_bundle_belongs_to_one_loop() -> None:
    kernel = tensorcore("rows_v6e", 4)
    assert kernel.bundles == 148
    assert [loop.bundles for loop in kernel.loops] == [14, 46, 44, 44]


def test_math_is_counted_where_it_is_issued() -> None:
    _, chunk, fetch, _ = (loop.counts for loop in tensorcore("rows_v6e", 4).loops)
    assert (chunk.vld, chunk.vst, chunk.eup) == (24, 24, 8)
    assert (fetch.vld, fetch.vst, fetch.eup, fetch.sld) == (0, 0, 0, 4)


def test_source_lines_tell_loops_apart() -> None:
    sources = [loop.source for loop in tensorcore("rows_v6e", 4).loops]
    assert sources == ["", "kernel.py:9-27", "kernel.py:12-15", "kernel.py:12-25"]


def test_delay_slots_belong_to_the_loop() -> None:
    fetch = tensorcore("rows_v6e", 4).loops[2]
    assert tensorcore("rows_v6e", 0).loops[2].bundles == fetch.bundles - 4


def test_delay_slots_are_found_where_each_branch_chooses_them() -> None:
    _, _, fetch, write = tensorcore("dynamic_7x", None).loops
    # One empty bundle follows the first branch; the second hides its DMAs in six.
    assert (fetch.bundles, fetch.empty) == (22, 1)
    assert (write.bundles, write.counts.dma) == (13, {"vmem_to_hbm": 3})


def test_a_trip_count_known_only_at_run_time_is_none() -> None:
    _, chunk, fetch, write = tensorcore("dynamic_7x", None).loops
    assert [loop.trip_count for loop in (chunk, fetch, write)] == [16, 32, None]


def test_bundles_under_a_condition_are_told() -> None:
    assert tensorcore("dynamic_7x", None).loops[1].skippable == 20
    assert all(loop.skippable == 0 for loop in tensorcore("rows_v6e", 4).loops)


def test_bounds_checks_are_counted() -> None:
    once, _, fetch, write = (loop.counts for loop in tensorcore("checked_v6e", 4).loops)
    assert fetch.checks == write.checks == 6  # two for each DMA
    assert once.checks == 2  # of the semaphores, at the end


def test_a_forward_branch_to_no_region_leads_to_the_end() -> None:
    text = """
     0   :  { %p1 = scmp.ne.s32.totalorder %s1, 0 }
   0x1   :  { %2 = sbr.rel (%p1) target = $region9 }
   0x2   :  {}
   0x3   :  { %v1 = vld [vmem:[#allocation2] sm:$0xff] }
   0x4   :  { %3 = vst [vmem:[#allocation2] sm:$0xff] /*vst_source=*/%v1 }
   0x5 PF:  {}
"""
    (once,) = parse_tensorcore(text, name="branch", delay_slots=1).loops
    assert (once.bundles, once.skippable) == (6, 2)


def test_a_dma_may_run_over_several_lines() -> None:
    text = """
     0   :  { %1 = dma.hbm_to_vmem (%p4), /*size_in_granules=*/16 /*
base_bounds: (512)
second_minor_factor: 1 */  ;;  %s2 = sld [smem:[#allocation0]] }
   0x1   :  { %3 = dma.done.wait [#allocation1], 16 }
"""
    (once,) = parse_tensorcore(text, name="lines", delay_slots=4).loops
    assert once.counts.dma == {"hbm_to_vmem": 1}
    assert (once.counts.sld, once.counts.waits, once.bundles) == (1, 1, 2)


def test_a_changed_format_is_an_error() -> None:
    with pytest.raises(ValueError, match="no bundles found"):
        parse_tensorcore("nothing of the kind", name="other", delay_slots=4)


def test_subcore_loops() -> None:
    once, mesh, chunk, math = subcore().loops
    assert [loop.trip_count for loop in (once, mesh, chunk, math)] == [1, None, 8, 14]
    assert chunk.counts.dma == {
        "indirect.gather": 3,
        "indirect.scatter": 3,
        "linear.gather": 1,
    }
    # A row of 128 lanes is 8 slices: 4 loads, 3 stores, 1 reciprocal each.
    assert math.bundles == 32
    assert (math.counts.vld, math.counts.vst, math.counts.eup) == (32, 24, 8)


def test_subcore_delay_slots_may_have_to_be_told() -> None:
    text = (DATA / "subcore_7x.txt").read_text()
    silent = re.sub(r"(sbr\.rel .*-\.Ltmp\d+), \$\d+", r"\1", text)
    assert subcore(silent, delay_slots=2).loops[3].bundles == 30
    with pytest.raises(ValueError, match="delay slots"):
        subcore(silent)


def test_subcore_delays_count_as_cycles() -> None:
    text = """tec
.LBB0_1:
0x0: {  	s1 =	sadd.s32 $0x1, s1;
	_ =	sdelay $0x3  }
.Ltmp0:
0x1: {  	(pc) =	sbr.rel @p0 .LBB0_1-.Ltmp0, $1  }
0x2: {  	_ =	snop  }
"""
    _, loop = subcore(text).loops
    assert (loop.bundles, loop.stalls, loop.cycles, loop.empty) == (3, 3, 6, 1)


def test_a_dump_without_a_subcore_program_is_none() -> None:
    assert parse_subcore("scs\n0x0: {  }\n", name="scs", delay_slots=2) is None


def test_rows_follow_from_trip_counts() -> None:
    report = attribute(
        tensorcore("rows_v6e", 4),
        work=KernelTotals(1024, 128, 1000),
        phases={},
        tables=3,
        granule=32,
        counted=True,
    )
    assert [entry.rows for entry in report.loops] == [1024, 64, 4, 4]
    assert report.phases == {
        "once": 14 / 1024,
        "chunk": 46 / 64,
        "fetch": 11.0,
        "write back": 11.0,
    }
    assert report.cycles_per_row == pytest.approx(22 + 46 / 64 + 14 / 1024)
    assert report.dmas_per_row == pytest.approx(6 + 1 / 1024)
    assert (report.checks, report.unattributed) == (0, 0)
    assert report.largest_dma_bytes == 4096


def test_rows_follow_from_dmas_where_trip_counts_are_unknown() -> None:
    report = attribute(
        tensorcore("dynamic_7x", None),
        work=KernelTotals(1024, 128, 1000),
        phases={},
        tables=3,
        granule=32,
        counted=True,
    )
    assert [entry.rows for entry in report.loops] == [1024, 64, 2, 1]


def loop_text(region: int, dmas: int) -> str:
    """A loop whose trip count is known only at run time, and its `dmas`."""
    lines = [
        f"0x{region}0 LB: > {{ %s3 = sphi %s1, %s2 }} /* Start region {region} */",
        *(
            f"0x{region}{at} : > {{ %{at} = dma.hbm_to_vmem ;; %s{at} = sld [smem] }}"
            for at in range(1, dmas + 1)
        ),
        f"0x{region}8 : {{ %8 = sbr.rel (!%p1) target = $region{region} }}",
        f"0x{region}9 : {{}}",
    ]
    return "\n".join(lines) + "\n"


def test_a_remainder_loop_tells_the_rows_of_the_unrolled_loop() -> None:
    text = loop_text(1, dmas=4) + loop_text(2, dmas=1)
    kernel = parse_tensorcore(text, name="unrolled", delay_slots=1)
    report = attribute(
        kernel,
        work=KernelTotals(64, 128, 1000),
        phases={},
        tables=3,
        granule=32,
        counted=True,
    )
    _, unrolled, remainder = report.loops
    assert (unrolled.phase, unrolled.rows) == ("fetch", 4)
    assert (remainder.phase, remainder.rows) == ("remainder", None)
    assert report.unattributed == 0
    assert report.cycles_per_row == 7 / 4  # of the remainder, nothing


def test_a_spilled_counter_still_gives_a_trip_count() -> None:
    text = """
  0x1   :  { %s5 = smov (!%p8), 0 /* copy for cssa */ }
  0x2 LB: > { %s6 = sphi %s5, %s7 /* phi copy */ } /* Start region 3 */
  0x3   : > { %s9 = sadd.s32 2, %s6  ;;  %4 = sst [smem:[#allocation1_spill]] %s9 }
  0x4   : > { %s7 = sld [smem:[#allocation1_spill]] }
  0x5   : > { %p1 = scmp.ge.s32.totalorder %s7, 9 }
  0x6   :  { %8 = sbr.rel (!%p1) target = $region3 }
  0x7   :  {}
"""
    _, loop = parse_tensorcore(text, name="spill", delay_slots=1).loops
    assert (loop.trip_count, loop.bundles) == (5, 6)


def test_a_loop_that_nothing_explains_is_left_out_and_said() -> None:
    report = attribute(
        subcore(),
        work=KernelTotals(128, 128, 1000),
        phases={},
        tables=3,
        granule=32,
        counted=True,
    )
    assert [entry.rows for entry in report.loops] == [128, None, None, None]
    assert report.unattributed == 3


def test_rules_of_the_program_come_first() -> None:
    report = attribute(
        subcore(),
        work=KernelTotals(128, 128, 1000),
        phases={"mesh": mesh_loop, "move": dmas_per_row(indirect=1)},
        tables=3,
        granule=32,
        counted=True,
    )
    # The math loop runs 14 times for 16 rows: two of them are peeled off.
    assert [entry.rows for entry in report.loops] == [128, 128, 16, 16 / 14]
    assert [entry.phase for entry in report.loops] == ["once", "mesh", "chunk", "math"]


def test_a_program_may_stand_in_a_module_of_its_own() -> None:
    assert find("benchmarks.static.jte:PROGRAM").streamed_rows == 29
    with pytest.raises(ValueError, match="is not one of xla_sorted"):
        find("no_such_program")


def test_slots_are_counted_by_kind() -> None:
    _, chunk, fetch, _ = (loop.counts for loop in tensorcore("rows_v6e", 4).loops)
    assert chunk.valu == 8 * 5  # of each register of 8 rows
    assert (chunk.mxu, chunk.xlu, chunk.spills) == (0, 0, 2)
    assert fetch.valu == 0 and fetch.salu > fetch.sld


def test_the_memory_of_a_subcore_is_read_off_its_addresses() -> None:
    assert 10_000 < subcore().tile_memory <= 512 * 1024


def test_dmas_per_row_asks_for_the_same_rows_in_each_direction() -> None:
    _, _, fetch, write = tensorcore("rows_v6e", 4).loops
    work = KernelTotals(1024, 128, 1000)
    assert dmas_per_row(hbm_to_vmem=3)(fetch, work) == 4
    assert dmas_per_row(hbm_to_vmem=5)(fetch, work) is None
    assert dmas_per_row(hbm_to_vmem=3)(write, work) is None
    assert dmas_per_row(hbm_to_vmem=3, vmem_to_hbm=3)(fetch, work) is None


def test_the_real_compiler_streams_the_table() -> None:
    from benchmarks.static import StaticCase, count_all

    rows, dim, ids = 2**20, 128, 2**12
    programs = ("xla_sorted", "no_such_program", "sweep")
    cases = [StaticCase(program, "v6e", rows - 1, dim, ids) for program in programs]
    fine, broken, sweep = count_all(cases)
    assert fine.error is None and fine.memory is not None
    table = (rows - 1) * dim * 4
    assert fine.memory.alias - 3 * table < 2**16  # updated in place ...
    assert fine.table_copies == ()
    assert fine.largest_dma_bytes > 2**20  # ... by windows of the table
    assert fine.phases["gather"] > 3 and fine.phases["apply"] > 3
    assert fine.streamed_tables == 3 and fine.bytes_per_row > 6 * table / ids
    assert fine.roofline is not None and fine.roofline.limit == "hbm"
    assert any(kernel.vmem_bytes > 2**20 for kernel in fine.kernels)
    assert set(fine.versions) == {"jax", "jaxlib", "libtpu"}
    assert broken.error is not None and "no_such_program" in broken.error
    # The last block is not full: it has DMAs of its own, which move nothing more.
    least = 6 * table / ids + 4 * dim
    assert sweep.error is None and least < sweep.bytes_per_row < 1.001 * least
    assert sweep.phases["update"] > 0.5 * rows / ids  # every row, for each id
