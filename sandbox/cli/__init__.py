"""Commands of `python -m sandbox`: module NAME holds COMMAND, a click.Command."""
