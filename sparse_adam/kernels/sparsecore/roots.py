"""Square roots on a vector subcore, which jax 0.10 forgot to lower."""

from jax import lax


def ensure_roots() -> None:
    """Adds jax's missing lowering rules for `rsqrt` and `sqrt` on vector subcores.

    The compiler knows both; only jax's table of rules lacks them, up to 0.10. Later
    versions have these very rules, and then nothing is done. So the step of a rule
    stays the one formula, with the roots that every other implementation takes.
    """
    try:
        from jax._src.lib.mlir.dialects import math
        from jax._src.pallas.mosaic import core, lowering
    except ImportError:  # a later jax, which has the rules elsewhere
        return
    kind = core.CoreType.SC_VECTOR_SUBCORE
    for primitive, operation in ((lax.rsqrt_p, math.rsqrt), (lax.sqrt_p, math.sqrt)):
        if primitive not in lowering.lowering_rules[kind]:
            lowering.register_lowering_rule(primitive, kernel_types=[kind])(
                lambda ctx, x, accuracy=None, operation=operation: operation(x)
            )
