"""How XLA compiles for the CPU in tests: in a quarter of the time.

Compiling takes most of the time of a test, and most of that goes into machine code that
is run once. So it is made the quick way: by the emitter that XLA had before that of
MLIR, in one part, and without LLVM's passes. XLA's own passes run as for users, but
some fusions are others, and a scatter becomes a loop. The programs of interpreted
kernels are no user's anyway. libtpu reads none of this.

Flags that were set before win, and `--xla_cpu_use_fusion_emitters=true` fuses as for
users. So do the campaign, the programs that a test starts as a user would, and
`programs.as_for_users`. XLA of later jaxlibs has the newer emitter only, and ends the
process if it is told of another.
"""

import jaxlib.version

HAS_OLD_EMITTER = jaxlib.version.__version_info__ <= (0, 11, 0)

QUICKLY = (
    "--xla_backend_optimization_level=0 --xla_cpu_parallel_codegen_split_count=1"
    + " --xla_cpu_use_fusion_emitters=false" * HAS_OLD_EMITTER
)
