"""The kernels in forms that need less of a TPU, to compile and count.

A program is named by that of a kernel, and by the field of the kernel's `Config` that
does without a feature: `sparsecore_row_copies`, `packed_tensorcore_checks`.
"""

import dataclasses
from collections.abc import Iterator
from functools import partial
from typing import Any

from benchmarks.static.program import Program
from benchmarks.static.programs import find
from sparse_adam.ops.dispatch import IMPLEMENTATIONS

_CONFIGS: dict[str, Any] = {
    one.name: one.config for one in IMPLEMENTATIONS if one.config is not None
}
KERNELS = tuple(f"{packed}{name}" for packed in ("", "packed_") for name in _CONFIGS)


def _programs(kernel: str) -> Iterator[Program]:
    """Yields the kernel in each form, and in all of them at once."""
    config, program = _CONFIGS[kernel.removeprefix("packed_")], find(kernel)
    in_form: Any = program.build
    each = {name: {name: value} for name, value in config.SAFE_FORMS.items()}
    for form, fields in (each | {"all": config.SAFE_FORMS}).items():
        build = partial(in_form, config=config(**fields))
        yield dataclasses.replace(program, name=f"{kernel}_{form}", build=build)


globals().update((one.name, one) for kernel in KERNELS for one in _programs(kernel))
