"""`python -m benchmarks`: the subcommands, each imported only when it is called."""

import importlib

import click

# Name of the subcommand: where its click command stands, and its line of help.
COMMANDS = {
    "peers": ("benchmarks.peers:peers", "Wall clock on a CPU beside torch's."),
    "report": ("benchmarks.report:report", "Rewrite the README's tables."),
    "static": ("benchmarks.static.report:main", "Cost per row of compiled programs."),
    "update": ("benchmarks.update:update", "Wall clock of one update, side by side."),
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
        return getattr(importlib.import_module(module), attribute)

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
