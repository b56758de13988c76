"""How a command line ends: its exit code, and bad input told in one line."""

from __future__ import annotations

import click


def run(group: click.Group, words, prog_name: str) -> int:
    """The exit code: 0, or what the command says; 2 on bad input (told in one line), 130 on Ctrl-C.

    ValueError and TypeError are how the floors below refuse what they are given.
    """
    try:
        return group.main(words, prog_name=prog_name, standalone_mode=False) or 0
    except click.exceptions.NoArgsIsHelpError as error:
        error.show()
    except click.ClickException as error:
        _tell(error.format_message())
    except (ValueError, TypeError) as error:
        if "\n" in (reason := getattr(error, "reason", "").strip()):  # a traceback of somebody's own file
            click.echo(reason, err=True)
        _tell(str(error))
    except (KeyboardInterrupt, click.Abort):
        return 130
    return 2


def _tell(message: str) -> None:
    click.echo(f"error: {' '.join(message.split())}", err=True)
