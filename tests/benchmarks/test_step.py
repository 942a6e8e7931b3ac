"""Whole steps: every contender computes one loss, and stages are summed by name."""

import importlib.util
import json
from dataclasses import asdict, replace
from pathlib import Path

import jax
import pytest
from click.testing import CliRunner

from benchmarks import step
from benchmarks.__main__ import main
from benchmarks.results import COMMITTED, read_records
from benchmarks.static.bundles import BundledKernel, Counts, Loop
from benchmarks.static.chips import CHIPS
from benchmarks.static.hlo import parse
from benchmarks.static.programs import PROGRAMS
from benchmarks.static.stages import (
    STAGES,
    Rules,
    Stage,
    operations,
    stage_of,
    sum_stages,
    tensorcore_share,
)
from benchmarks.static.tables import bounds_table
from benchmarks.steps.cases import COMPILED, QUICK, TIMED, StepCase
from benchmarks.steps.contenders import BATCHES, CONTENDERS
from benchmarks.steps.dlrm import MULTI_HOT, ROWS, dlrm
from benchmarks.steps.model import draw_batch
from benchmarks.steps.program import build
from benchmarks.steps.summing import merged
from benchmarks.steps.tables import stages_table, sums_table
from benchmarks.steps.two_tower import two_tower
from benchmarks.steps.word2vec import word2vec

TINY = {
    "dlrm": lambda: dlrm(9, 4, 6, places=(2, 1), dense="light"),
    "two_tower": lambda: two_tower(12, 4, 5),
    "word2vec": lambda: word2vec(15, 4, 6),
}


@pytest.fixture(autouse=True)
def as_users_run_it():
    """optax mixes dtypes, which the tests of the package forbid."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


TORCH = importlib.util.find_spec("torch") is not None


@pytest.mark.parametrize("name", TINY)
def test_every_contender_computes_the_same_losses(name):
    model = TINY[name]()
    losses = {}
    for impl, (_, start) in CONTENDERS.items():
        if impl != "torch" or TORCH:
            running = start(model)
            losses[impl] = [running.step(turn)() for turn in range(6)]
    ours = losses["ours"]
    assert ours[4] < ours[0] and ours[5] < ours[1]  # the same batches again
    # Dense Adam moves rows whose momenta are not zero: other weights from there on.
    assert losses["packed"] == pytest.approx(ours, rel=1e-5)
    assert losses["plain"][:2] == pytest.approx(ours[:2], rel=1e-5)
    if TORCH:
        assert losses["torch"] == pytest.approx(ours, rel=1e-5)


def test_losses_that_differ_are_a_failure(monkeypatch):
    class Other:
        compile_seconds = 0.0

        def __init__(self, model):
            pass

        def step(self, turn):
            return lambda: 1.0

    case = StepCase("tiny", "words", word2vec, 15, 4, 6)
    monkeypatch.setitem(CONTENDERS, "plain", ("other", Other))
    ours, other = step.measure(case, ["ours", "plain"], rounds=2)
    assert ours.status == "ok" and len(ours.ms) == 2 and ours.ratio == 1
    assert other.status == "failed" and "of the first contender" in other.reason


def test_dlrm_is_mlperfs():
    assert len(ROWS) == len(MULTI_HOT) == 26 and sum(MULTI_HOT) == 214
    model = dlrm(586_000, 64, 2048, places=MULTI_HOT, dense="light")
    assert model.num_ids == 214 * 2048
    assert max(table.rows for table in model.tables.values()) == 586_000
    assert model.weights["cross0_0"] == (27 * 64, 16)


def test_ids_are_log_uniform():
    model = word2vec(10_000, 4, 4096)
    batch = draw_batch(model, 0)
    ids = batch.ids["negative"]
    assert ids.shape == (4096, 8, 1) and ids.min() >= 0 and ids.max() < 10_000
    # As many between 1 and 100 as between 100 and 10,000.
    assert 0.45 < (ids < 100).mean() < 0.55
    assert (draw_batch(model, 1).ids["negative"] != ids).any() and BATCHES > 1


def test_the_command_writes_what_it_prints(tmp_path):
    out = tmp_path / "step.json"
    arguments = ["--quick", "--case", "quick_word2vec", "--impl", "ours"]
    arguments += ["--cap", "50", "--dim", "8", "--batch", "16", "--rounds", "2"]
    done = CliRunner().invoke(main, ["step", *arguments, "--out", str(out)])
    assert done.exit_code == 0, done.output
    (row,) = json.loads(out.read_text())["rows"]
    assert (row["impl"], row["status"], len(row["ms"])) == ("ours", "ok", 2)
    assert (row["rows"], row["dim"], row["ids"]) == (100, 8, 160)
    assert row["ratio"] == 1 and row["ratio_bounds"] == [1, 1]
    assert "sparse_adam.embedding" in done.output


def test_a_mean_is_combined_by_every_contender():
    model = replace(TINY["two_tower"](), combiner="mean")
    losses = {
        impl: [start(model).step(0)()]
        for impl, (_, start) in CONTENDERS.items()
        if impl != "torch" or TORCH
    }
    summed = CONTENDERS["ours"][1](TINY["two_tower"]()).step(0)()
    assert losses["ours"] != pytest.approx([summed], rel=1e-5)
    for found in losses.values():
        assert found == pytest.approx(losses["ours"], rel=1e-5)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--case", "nonsense"], "'nonsense' is not one of dlrm,"),
        (["--chip", "v6e"], "--chip goes with --static only"),
        (["--keep"], "--keep goes with --static only"),
    ],
)
def test_wrong_options_are_said(arguments, words):
    done = CliRunner().invoke(main, ["step", *arguments])
    assert done.exit_code == 2 and words in done.output


def test_names_of_cases_are_unique():
    for cases in (TIMED + QUICK, COMPILED):
        assert len({case.name for case in cases}) == len(cases)


def test_a_compiled_step_updates_its_state_in_place():
    case = StepCase("tiny", "words", word2vec, 15, 128, 6)
    function, arguments, donated = build(case, 15, 128, 6)
    assert len(arguments) == len(donated) + 4  # three features, and the number
    shapes = [x.shape for x in arguments]
    state, loss = jax.eval_shape(function, *arguments)
    assert [x.shape for x in jax.tree.leaves(state)] == shapes[: len(donated)]
    assert loss.shape == ()


@pytest.mark.parametrize(
    ("scope", "is_kernel", "stage"),
    [
        ("jit(step)/lookup/jit(_combine)/combine/reduce_sum", False, "combine"),
        ("jit(step)/update/jit(run_update)/plan/jit(_sort)/sort", False, "plan"),
        ("jit(step)/update/jit(run_update)/gather", False, "prepare"),
        ("jit(step)/update/jit(run_update)/sparse_adam/mpmd_map", True, "update"),
        ("jit(step)/transpose(jvp(dense))/dot_general", False, "dense"),
        ("jit(step)/lookups/copy", False, "other"),
        ("", False, "other"),
    ],
)
def test_the_innermost_scope_is_the_stage(scope, is_kernel, stage):
    assert stage_of(scope, is_kernel) == stage


def test_stages_of_a_program_are_summed():
    text = (Path(__file__).parent / "data" / "step.hlo").read_text()
    module = parse(text)
    assert module.donated == (0,) and module.tables == {("s32", 300 * 128)}
    chip = CHIPS["v6e"]
    programs = [PROGRAMS["packed_tensorcore"]]
    rules = Rules(programs, dim=128, table_rows=100, many=256)
    kernels = [
        _kernel("sort.1", 700),
        _kernel("gather_fusion.1", 10, (32, 8)),
        _kernel("dot.1", 5),
        # 16 rows in 73 cycles; what it does once is of no account here.
        _kernel("sparse_adam_new.1", 9, (73, 16)),
        _kernel("TLP", 2000),
    ]
    stages = sum_stages(operations(module, kernels, chip, rules), chip)
    clock, bandwidth = chip.clock, chip.bandwidth
    plan, prepare, update = stages["plan"], stages["prepare"], stages["update"]
    # `sort.2` has no dump of its own: it is the same as `sort.1`.
    assert plan.sorts == plan.operations == 2 and plan.uncounted == 0
    assert plan.issue_ns == pytest.approx(2 * 700 / clock)
    assert prepare.scalar_gathers == 1 and prepare.operations == 2
    assert prepare.issue_ns == pytest.approx((10 + 8 * 32) / clock)
    # The copy without a scope is the kernel's, since the kernel reads it: half a MiB.
    assert prepare.hbm_ns == pytest.approx(1024 * 128 * 4 / bandwidth)
    assert update.launches == 1 and update.hbm_ns == pytest.approx(5000 / bandwidth)
    assert update.issue_ns == pytest.approx((9 + 16 * 73) / clock)
    assert update.ns == max(update.issue_ns, update.hbm_ns) == update.distinct_ns
    assert update.tensorcore_ns == update.ns  # so there is nothing to compare it with
    assert tensorcore_share({k: asdict(s) for k, s in stages.items()}) is None
    assert stages["dense"].operations == 3  # of a loop that runs three times
    assert stages["dense"].issue_ns == pytest.approx(3 * 5 / clock)
    assert stages["other"].issue_ns == pytest.approx(2000 / clock)
    assert sum(stage.unknown_loops for stage in stages.values()) == 0


IN_PLACE = """HloModule jit_step, is_scheduled=true

%put (p.1: f32[4096,128], p.2: f32[4096,128], p.3: s32[]) -> f32[4096,128] {
  %p.1 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %p.2 = f32[4096,128]{1,0:T(8,128)} parameter(1)
  %p.3 = s32[]{:T(128)} parameter(2)
  %slice.1 = f32[64,128]{1,0:T(8,128)} slice(%p.2), slice={[0:64], [0:128]}
  ROOT %new.1 = f32[4096,128]{1,0:T(8,128)} dynamic-update-slice(%p.1, %slice.1, %p.3)
}

ENTRY %main.1 (a.1: f32[4096,128], b.1: f32[4096,128], c.1: s32[]) -> f32[4096,128] {
  %a.1 = f32[4096,128]{1,0:T(8,128)} parameter(0)
  %b.1 = f32[4096,128]{1,0:T(8,128)} parameter(1)
  %c.1 = s32[]{:T(128)S(2)} parameter(2)
  ROOT %put.1 = f32[4096,128]{1,0:T(8,128)} fusion(%a.1, %b.1, %c.1), calls=%put
}
"""


def test_an_update_in_place_moves_what_is_put_into_it():
    module = parse(IN_PLACE)
    ((computation, put),) = module.executed()
    assert module.bytes_moved(computation, put) == 2 * 64 * 128 * 4  # in, and out


def _kernel(name, once, loop=None):
    loops = [_loop(0, None, once, 1)]
    if loop is not None:
        loops.append(_loop(1, 0, *loop))
    return BundledKernel(name, "tensorcore", tuple(loops))


def _loop(index, parent, bundles, trips):
    return Loop(
        index=index,
        parent=parent,
        depth=index,
        start=0,
        end=bundles,
        bundles=bundles,
        empty=0,
        skippable=0,
        stalls=0,
        trip_count=trips,
        innermost=index > 0,
        counts=Counts(),
        source="",
    )


def test_tables_show_the_stages_of_an_id():
    record = _record("one_table", "v6e", plan=100.0, lookup=30.0, update=200.0)
    failed = {"case": "dlrm", "chip": "v4", "ids": 5, "error": "TypeError: no"}
    found = {"records": [record, failed]}
    header, lines = sums_table(found)
    assert header == ["", "v6e"]
    values = dict(lines)
    assert values["plan: the sort"] == "10.00"
    assert values["the update with all around it"] == "30.00"
    assert values["**sum**"] == "**33.00**"
    assert values["if ids were distinct"] == "16.50"
    assert values["launches"] == "2"
    header, lines = stages_table(found)
    cells = dict(zip(header, lines[0], strict=True))
    # 130 ns on the TensorCore, and an update of 100 ns of distinct ids elsewhere.
    assert cells["TensorCore beside SparseCore"] == "1.30"
    assert cells["launches of the update"] == "2"
    assert (cells["**sum**"], cells["dense"]) == ("**33.00**", "0.00")
    assert cells["the update in all"] == "30.00" and cells["sorts"] == "0"
    assert lines[1][:4] == ["`dlrm`", "v4", "5", "TypeError"]
    assert len(lines[1]) == len(header)


def _record(case, chip, **ns):
    stages = {
        name: asdict(
            Stage(
                ns=ns.get(name, 0.0),
                distinct_ns=ns.get(name, 0.0) / 2,
                tensorcore_ns=0.0 if name == "update" else ns.get(name, 0.0),
            )
        )
        for name in STAGES
    }
    stages["update"]["launches"] = 2
    times = ("trace_processor_seconds", "compile_processor_seconds")
    known = {"case": case, "chip": chip, "ids": 10, "error": None, "stages": stages}
    return known | dict.fromkeys(times, 1.0)


def test_a_new_record_takes_the_place_of_the_old_one():
    known = [("one_table", "v6e"), ("dlrm", "v5e"), ("dlrm", "7x")]
    records = [{"case": case, "chip": chip, "ids": 1} for case, chip in known]
    records = merged(records, {"case": "dlrm", "chip": "v6e", "ids": 2})
    records = merged(records, {"case": "dlrm", "chip": "v5e", "ids": 3})
    assert [(each["chip"], each["ids"]) for each in records] == [
        *(("v6e", 1), ("v5e", 3), ("v6e", 2), ("7x", 1)),
    ]


def test_kernels_have_a_line_for_repeated_ids():
    header, lines = bounds_table(read_records(COMMITTED / "static.json"))
    titles = [title for title, *_ in lines]
    at = titles.index("sparse_adam, TensorCore")
    assert titles[at + 1] == "sparse_adam, TensorCore, ids repeat"
    for distinct, repeated in zip(lines[at][1:], lines[at + 1][1:], strict=True):
        # Each repeat is a sum more, which takes less than all else of a row.
        share = float(repeated.split()[0]) / float(distinct.split()[0])
        assert 1.1 < share < 1.5
    assert len(header) == len(lines[at + 1])
    assert "sparse_adam, sweep of all rows, ids repeat" not in titles
