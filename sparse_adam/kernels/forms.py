"""Forms of a kernel that ask less of a TPU than the fastest one does."""

from typing import Any, ClassVar


class SafeForms:
    """What the configs of kernels have in common.

    Attributes:
        SAFE_FORMS: fields of the config, each with a value that does without one
            feature of a TPU, the cheapest first.
    """

    __slots__ = ()
    SAFE_FORMS: ClassVar[dict[str, Any]]

    @property
    def forms(self) -> dict[str, Any]:
        """Returns those fields as they are here."""
        return {name: getattr(self, name) for name in self.SAFE_FORMS}
