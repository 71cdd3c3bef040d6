"""The library's own errors: what a user can mend. Each is also the built-in error that it is a case of."""

import re
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

__all__ = ["DiffrlError", "FileError", "InputError", "InputKeyError", "InputTypeError", "of_group"]

UNKNOWN = re.compile(r"got an unexpected keyword argument '(.+?)'")


class DiffrlError(Exception):
    """Something that the user can mend: the text names the thing and the remedy. Commands print it in one line."""


class InputError(DiffrlError, ValueError):
    """A value that cannot be used."""


class InputTypeError(DiffrlError, TypeError):
    """A value of a type that cannot be used."""


class InputKeyError(DiffrlError, KeyError):
    """A name or an entry that is not there."""

    __str__ = Exception.__str__  # a KeyError quotes its text


class FileError(DiffrlError, OSError):
    """A file or folder cannot be read or written."""


@contextmanager
def of_group(group: str, options: Iterable[str]) -> Iterator[None]:
    """Name the options in errors as a user types them: ``lmbda is 2`` becomes ``objective.lmbda is 2``.

    Args:
        group: the config group.
        options: names of its keys.
    """
    try:
        yield
    except (InputError, InputTypeError) as error:
        text, names = str(error), "|".join(map(re.escape, options))
        if names:
            text = re.sub(rf"^({names})\b(?!=)|`({names})`", lambda m: f"{group}.{m[1] or m[2]}", text)
        if text == str(error):
            raise
        raise type(error)(text) from error
    except TypeError as error:
        unknown = UNKNOWN.search(str(error))
        if unknown is None or unknown[1] not in options:
            raise
        raise InputTypeError(
            f"{group}.{unknown[1]} is no option: take it out of the configuration"
        ) from error
