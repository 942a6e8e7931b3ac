"""`python -m benchmarks`: the subcommands, each imported only when it is called."""

import importlib
import sys

try:
    import click

    from benchmarks.options import missing_extra
except ModuleNotFoundError:
    sys.exit(
        "`python -m benchmarks` needs click, which is not installed: pip install "
        "'.[bench]' installs what the benchmarks need"
    )

# Name of the subcommand: where its click command stands, and its line of help.
COMMANDS = {
    "bounds": (
        "benchmarks.static.bounds:bounds",
        "The least times that sparse_adam.check shows.",
    ),
    "bundles": (
        "benchmarks.static.cost:bundles",
        "The figures by which the package chooses its sweep.",
    ),
    "compare": ("benchmarks.compare:compare", "Two result files, or two commits."),
    "lookup": ("benchmarks.lookup:lookup", "Bags of ids on a CPU, ours and torch's."),
    "plot": ("benchmarks.figures:plot", "Draw the figures of a folder of results."),
    "report": ("benchmarks.report:report", "Figures, tables and a report of results."),
    "routing": (
        "benchmarks.routing:routing",
        "What a routed batch sends between many chips; no TPU needed.",
    ),
    "scale": ("benchmarks.scale:scale", "How cost grows with V, N, D, duplicates."),
    "static": (
        "benchmarks.static.report:main",
        "Compiled TPU programs; no TPU needed.",
    ),
    "step": (
        "benchmarks.step:step",
        "Whole training steps: wall clock, or TPU stages summed.",
    ),
    "update": ("benchmarks.update:update", "Wall clock of every contender here."),
}


class LazyGroup(click.Group):
    """Subcommands whose imports do not slow down, or break, one another."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """The names, without importing anything."""
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """The command, imported now."""
        if cmd_name not in COMMANDS:
            return None
        module, _, attribute = COMMANDS[cmd_name][0].partition(":")
        try:
            return getattr(importlib.import_module(module), attribute)
        except ModuleNotFoundError as error:
            # A module of this repository that is missing is no matter of extras.
            if error.name is None or error.name.partition(".")[0] == "benchmarks":
                raise
            raise click.ClickException(missing_extra(cmd_name, error)) from error

    def format_commands(
        self, ctx: click.Context, formatter: click.HelpFormatter
    ) -> None:
        """The list in `--help`, without importing anything."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, COMMANDS[name][1]) for name in sorted(COMMANDS)])


@click.group(cls=LazyGroup)
def main() -> None:
    """Benchmarks of sparse_adam."""


if __name__ == "__main__":
    main(prog_name="python -m benchmarks")
