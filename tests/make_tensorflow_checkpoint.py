"""Has TensorFlow write checkpoints of its embedding, and notes the names in them.

The tests read `tensorflow_checkpoint.json`, so that they need no TensorFlow. To make it
anew:

    pip install '.[parity]'
    python -m tests.make_tensorflow_checkpoint
"""

import importlib
import itertools
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

FILE = Path(__file__).with_name("tensorflow_checkpoint.json")


def made_embedding(tf: Any) -> Any:
    """Returns an embedding of four tables: of three optimizers, one without a name."""
    api = tf.tpu.experimental.embedding
    tables = (
        api.TableConfig(2, 1, name="user"),
        api.TableConfig(1, 2, name="video/a.Sb", optimizer=api.FTRL(0.1)),
        api.TableConfig(1, 1),
        api.TableConfig(2, 2, name="video", optimizer=api.SGD(0.1)),
    )
    embedding = api.TPUEmbedding(list(map(api.FeatureConfig, tables)), api.Adam(0.1))
    embedding.build(1)
    return embedding


def arrays_in(tf: Any, path: str) -> dict[str, Any]:
    """Returns the numbers of a checkpoint by name."""
    reader = tf.train.load_checkpoint(path)
    return {
        name: reader.get_tensor(name).tolist()
        for name in sorted(reader.get_variable_to_shape_map())
        if name != "_CHECKPOINTABLE_OBJECT_GRAPH"
    }


def main() -> None:
    """Writes the file."""
    tf = importlib.import_module("tensorflow")
    embedding = made_embedding(tf)
    numbers = itertools.count(1)
    tables: dict[str, dict[str, Any]] = {}
    for table, variables in sorted(embedding._variables.items()):
        for slot, variable in sorted(variables.items()):
            count = int(np.prod(variable.shape))
            values = [float(next(numbers)) for _ in range(count)]
            variable.assign(np.reshape(values, variable.shape))
            tables.setdefault(table, {})[slot] = variable.numpy().tolist()
    model = tf.Module()
    model.embedding, model.user = embedding, [tf.Variable(0.5)]
    all_variables = [v for own in embedding._variables.values() for v in own.values()]
    with tempfile.TemporaryDirectory() as folder:
        checkpoint = tf.train.Checkpoint(model=model).save(folder + "/object")
        saver = tf.compat.v1.train.Saver(all_variables).save(None, folder + "/saver")
        found = {
            "tensorflow": tf.__version__,
            "tables": tables,
            "checkpoint": arrays_in(tf, checkpoint),
            "saver": arrays_in(tf, saver),
        }
    FILE.write_text(json.dumps(found) + "\n")


if __name__ == "__main__":
    main()
