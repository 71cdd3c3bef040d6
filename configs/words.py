"""A parser of words with dashes, for the commands that compose no configuration."""

import argparse
from typing import NoReturn

from diffrl.errors import InputError

__all__ = ["Words"]


class Words(argparse.ArgumentParser):
    """Raises what a user can mend, in place of its own two lines.

    Args:
        command: its name.
        description: what it does.
        epilog: what else its help says, laid out by hand.
    """

    def __init__(self, command: str, description: str | None, epilog: str | None = None) -> None:
        layout = argparse.RawDescriptionHelpFormatter
        super().__init__(
            prog=f"diffrl {command}", description=description, epilog=epilog, formatter_class=layout
        )

    def error(self, message: str) -> NoReturn:
        raise InputError(f"{message}; {self.prog} --help tells what can be given")
