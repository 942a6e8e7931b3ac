"""Tables and features: TensorFlow's defaults and rules, values, names, sharing."""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from sparse_adam import embedding
from sparse_adam.embedding import Adam, init
from sparse_adam.embedding.tables import make_layout

# Many tests give them what their types do not allow.
FeatureConfig: Any = embedding.FeatureConfig
QuantizationConfig: Any = embedding.QuantizationConfig
TableConfig: Any = embedding.TableConfig
KEY = jax.random.key(0)


def defaults(cls):
    return {f.name: f.default for f in dataclasses.fields(cls)}


def test_arguments_and_defaults_are_tensorflows():
    missing = dataclasses.MISSING
    assert list(defaults(TableConfig).items()) == [
        ("vocabulary_size", missing),
        ("dim", missing),
        ("initializer", None),
        ("optimizer", None),
        ("combiner", "mean"),
        ("name", None),
        ("quantization_config", None),
        ("dtype", np.float32),  # from here on not TensorFlow's
        ("slot_dtype", np.float32),
        ("trainable", True),
    ]
    assert list(defaults(FeatureConfig).items()) == [
        ("table", missing),
        ("max_sequence_length", 0),
        ("validate_weights_and_indices", True),
        ("output_shape", None),
        ("name", None),
    ]
    assert list(defaults(QuantizationConfig)) == ["num_buckets", "lower", "upper"]


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda: TableConfig(0, 4), "vocabulary_size=0 must be an int and at least 1"),
        (lambda: TableConfig(8.0, 4), "vocabulary_size=8.0 must be an int"),
        (lambda: TableConfig(True, 4), "vocabulary_size=True must be an int"),
        (lambda: TableConfig(8, -1), "dim=-1 must be an int and at least 1"),
        (lambda: TableConfig(8, 4, initializer=0), "initializer=0 must be a callable"),
        (lambda: TableConfig(8, 4, optimizer=0.1), "optimizer=0.1 must be an optimize"),
        (lambda: TableConfig(8, 4, optimizer=Adam), "such as Adam"),
        (lambda: TableConfig(8, 4, combiner="max"), r"combiner='max' must be one of"),
        (lambda: TableConfig(8, 4, combiner=None), "combiner=None must be one of"),
        (lambda: TableConfig(8, 4, name=3), "name=3 must be a string"),
        (
            lambda: TableConfig(8, 4, quantization_config=3),
            "quantization_config=3 must",
        ),
        (
            lambda: TableConfig(8, 4, dtype="float16", name="t"),
            "dtype='float16' of table 't' must be jnp.float32 or jnp.bfloat16",
        ),
        (lambda: TableConfig(8, 4, dtype=None), "dtype=None of table None must be"),
        (lambda: TableConfig(8, 4, dtype=3), "dtype=3 of table None must be"),
        (lambda: TableConfig(8, 4, slot_dtype=int), "slot_dtype=<class 'int'> of"),
        (lambda: FeatureConfig("video"), "table='video' must be a TableConfig"),
        (lambda: feature(max_sequence_length=-1), "max_sequence_length=-1 must be an"),
        (lambda: feature(max_sequence_length=2.0), "max_sequence_length=2.0 must be"),
        (lambda: feature(validate_weights_and_indices=1), "must be True or False"),
        (
            lambda: feature(output_shape=(2, 0)),
            r"output_shape=\(2, 0\) must be a tuple",
        ),
        (lambda: feature(output_shape=4), "output_shape=4 must be a tuple"),
        (lambda: feature(name=1), "name=1 must be a string"),
        (lambda: QuantizationConfig(1, 0, 1), "num_buckets=1 must be an int and at"),
        (lambda: QuantizationConfig(2.0, 0, 1), "num_buckets=2.0 must be an int"),
        (lambda: QuantizationConfig(4, 1, 1), "lower=1 and upper=1 must be finite"),
        (lambda: QuantizationConfig(4, 0, float("inf")), "must be finite numbers"),
    ],
)
def test_bad_values(make, text):
    with pytest.raises(ValueError, match=text):
        make()


def feature(**options):
    return FeatureConfig(TableConfig(8, 4), **options)


def test_equal_by_value_hashable_and_frozen():
    def table(**options):
        return TableConfig(8, 4, optimizer=Adam(0.1), name="a", **options)

    assert table() == table() and hash(table()) == hash(table())
    assert table() != table(combiner="sum")
    assert TableConfig(np.int64(8), 4) == TableConfig(8, 4)
    assert FeatureConfig(table()) == FeatureConfig(table())
    assert len({FeatureConfig(table()), FeatureConfig(table())}) == 1
    assert FeatureConfig(table(), output_shape=[2, 3]).output_shape == (2, 3)
    assert QuantizationConfig(4, 0, 1) == QuantizationConfig(4, 0.0, 1.0)
    with pytest.raises(dataclasses.FrozenInstanceError):
        table().dim = 5


def test_repr_shows_what_is_set():
    table = TableConfig(8, 4, name="video")
    assert repr(table) == "TableConfig(vocabulary_size=8, dim=4, name='video')"
    assert repr(FeatureConfig(table, 3)) == (
        f"FeatureConfig(table={table!r}, max_sequence_length=3)"
    )


def test_default_initializer_is_a_truncated_normal():
    state = init(FeatureConfig(TableConfig(4000, 16)), Adam(), KEY)
    table = np.asarray(state.tables["table_0"].table)
    assert table.shape == (4000, 16) and table.dtype == np.float32
    # TensorFlow's is cut off at two deviations, and not scaled up for that.
    assert abs(table).max() <= 0.5
    assert table.std() == pytest.approx(0.25 * 0.8796, rel=0.02)
    assert abs(table.mean()) < 0.01
    for slot in state.tables["table_0"][1:]:
        assert slot.shape == (4000, 16) and not np.any(slot)


def test_initializer_is_called_with_key_shape_and_dtype():
    def initializer(key, shape, dtype):
        seen.append(dtype)
        return jnp.full(shape, 3, dtype)

    seen = []
    for options in ({}, {"dtype": jnp.bfloat16}, {"slot_dtype": jnp.bfloat16}):
        config = FeatureConfig(TableConfig(5, 2, initializer, **options))
        for storage in ("plain", "packed"):
            stored = init(config, Adam(), KEY, storage=storage).tables["table_0"]
            table, *slots = (x.dtype for x in stored)
            assert table == seen.pop() == options.get("dtype", jnp.float32)
            assert slots == [options.get("slot_dtype", jnp.float32)] * 2
    wrong = TableConfig(5, 2, lambda key, shape, dtype: jnp.ones((5, 3)))
    with pytest.raises(ValueError, match=r"returned the shape \(5, 3\); it must be"):
        init(FeatureConfig(wrong), Adam(), KEY)


def test_initializers_of_another_dtype():
    def returns(dtype):
        return TableConfig(5, 2, lambda *_: np.ones((5, 2), dtype))

    config = FeatureConfig(returns(np.float64))
    assert init(config, Adam(), KEY).tables["table_0"].table.dtype == jnp.float32
    for dtype in (jnp.float16, jnp.bfloat16, jnp.int32):
        text = f"'table_0' returned dtype={np.dtype(dtype)}; it must be float32"
        with pytest.raises(TypeError, match=text):
            init(FeatureConfig(returns(dtype)), Adam(), KEY)


def test_each_table_has_its_own_numbers():
    config = [FeatureConfig(TableConfig(6, 3)), FeatureConfig(TableConfig(6, 3))]
    tables = init(config, Adam(), KEY).tables
    assert np.all(tables["table_0"].table != tables["table_1"].table)


def test_the_same_object_is_one_table_and_equal_ones_are_two():
    one, two = TableConfig(8, 4), TableConfig(8, 4)
    assert one == two
    layout = make_layout([*map(FeatureConfig, (one, two, one))], Adam())
    assert [f.table for f in layout.features] == [0, 1, 0]
    assert [t.name for t in layout.tables] == ["table_0", "table_1"]
    assert layout != make_layout([*map(FeatureConfig, (one, one, one))], Adam())
    again = make_layout([*map(FeatureConfig, (one, two, one))], Adam())
    assert layout == again and hash(layout) == hash(again)


def test_names_of_tables():
    named, unnamed = TableConfig(8, 4, name="a"), TableConfig(8, 4)
    layout = make_layout([FeatureConfig(named), FeatureConfig(unnamed)], Adam())
    assert [t.name for t in layout.tables] == ["a", "table_1"]
    for other in (TableConfig(8, 4, name="a"), TableConfig(9, 4, name="a")):
        with pytest.raises(ValueError, match="two tables have the name='a'"):
            make_layout([FeatureConfig(named), FeatureConfig(other)], Adam())


def test_optimizer_of_a_table_goes_before_the_global_one():
    own = TableConfig(8, 4, optimizer=Adam(0.2))
    config = {"a": FeatureConfig(own), "b": FeatureConfig(TableConfig(8, 4))}
    layout = make_layout(config, Adam(0.1))
    assert [t.optimizer for t in layout.tables] == [Adam(0.2), Adam(0.1)]
    assert own.optimizer == Adam(0.2)
    make_layout(FeatureConfig(own), None)
    with pytest.raises(ValueError, match="table 'table_1' has no optimizer"):
        make_layout(config, None)
    with pytest.raises(ValueError, match=r"optimizer='adam' must be an optimizer"):
        make_layout(config, cast(Any, "adam"))


def test_bad_feature_configs():
    with pytest.raises(ValueError, match="must hold at least one FeatureConfig"):
        make_layout({}, Adam())
    with pytest.raises(ValueError, match=r"has TableConfig.* at 'a/0'"):
        make_layout({"a": [TableConfig(8, 4)]}, Adam())
