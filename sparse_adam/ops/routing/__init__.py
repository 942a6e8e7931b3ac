"""Exact routing of ids to the devices that own the rows of a table.

Every device has its shard of a batch's ids and its shard of a table's rows. `route`
removes the duplicates of each device and sends what is left to the owners. `lookup`
brings the rows back to the devices that asked, and `update` sends one summed gradient a
row to its owner. All three are called inside `jax.shard_map`.

How: ids are turned into places (`placement`), sorted and made unique (`unique`), and
travel in rounds (`rounds`) through buffers of a fixed size (`exchange`). One round is
the rule. A batch that does not fit takes more of them, and nothing is ever dropped.
Rounds are cut by id: every device sends its part of a row in the same round, so that an
owner steps each row once.

Bytes: a device receives 4 D bytes for each of its unique ids in `lookup`, and 4 D + 4
bytes in `route` and `update` for each unique id that others send to it. Neither depends
on the number of devices. Temporaries depend on the number of ids a device only.
"""

from sparse_adam.ops.routing.placement import Placement
from sparse_adam.ops.routing.rounds import Quota, default_quota
from sparse_adam.ops.routing.route import (
    Route,
    lookup,
    lookup_unique,
    route,
    sum_occurrences,
    update,
    update_unique,
)
from sparse_adam.ops.routing.unique import sum_equal, sum_runs

__all__ = [
    "Placement",
    "Quota",
    "Route",
    "default_quota",
    "lookup",
    "lookup_unique",
    "route",
    "sum_equal",
    "sum_occurrences",
    "sum_runs",
    "update",
    "update_unique",
]
