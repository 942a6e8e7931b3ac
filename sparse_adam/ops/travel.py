"""Telling how a batch travels between devices: by which collectives, and how much."""

from typing import NamedTuple

from sparse_adam.ops.routing import Quota, default_quota
from sparse_adam.ops.routing.rounds import message_words

EXCHANGE = "  ragged-all-to-all on TPUs, all-to-all of equal parts elsewhere"


class Travel(NamedTuple):
    """A batch of N ids on each of n devices, whose rows have D numbers.

    Attributes:
        num_ids: N.
        num_devices: n.
        dim: D.
    """

    num_ids: int
    num_devices: int
    dim: int

    @property
    def quota(self) -> Quota:
        """Returns what travels in a round."""
        return default_quota(self.num_ids, self.num_devices)

    @property
    def ids(self) -> str:
        """Says how many there are."""
        return f"{self.num_ids:,} ids on each of {self.num_devices} devices"

    @property
    def route(self) -> str:
        """Says what a device receives when ids are sent to the owners of rows."""
        words = 4 * self.num_devices * message_words(self.quota)
        return (
            f"one all-to-all of {words:,} bytes and one of {4 * self.num_devices} bytes"
        )

    @property
    def update(self) -> str:
        """Says what an owner receives in an update."""
        total = self.quota.total
        return (
            f"  update: up to {total:,} summed gradients, {4 * total * self.dim:,} "
            "bytes, in a round"
        )

    @property
    def rounds(self) -> str:
        """Says when one round is enough."""
        return (
            f"  one round, if no device is asked for more than {self.quota.total:,} "
            f"rows, by one for {self.quota.part:,}"
        )
