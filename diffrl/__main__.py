"""The commands: diffrl train|check|finetune|... WORDS, or python -m diffrl in a checkout."""

import os
import signal
import sys
from types import FrameType

from diffrl.errors import DiffrlError

COMMANDS = {
    "train": "show what bootstrapping does, or train a denoiser of your choice",
    "check": "check a training run before it is started",
    "finetune": "tune a denoiser for a reward, or compare methods of tuning",
    "compare": "compare bootstrapping schemes over data sets and seeds",
    "sample": "draw samples from a run or a model",
    "report": "write the report of a comparison anew, from its folder alone",
    "evaluate": "measure the model of a finished run again, with other settings",
    "export": "write the model of a run as a folder to hand over, or for diffusers",
    "list": "tell the names that can be given: data, networks, objectives, ...",
}
"""What each does, for the help."""

_LINES = "\n".join(f"  {name:10} {what}" for name, what in COMMANDS.items())
USAGE = f"""\
usage: diffrl COMMAND WORDS...        (or python -m diffrl COMMAND WORDS...)

{_LINES}

diffrl COMMAND --help lists the words of each; --import MODULE makes methods of your own known.
"""


def main() -> None:
    """Run the command that the first word names."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return
    if name not in COMMANDS:
        sys.exit(f"error: there is no command {name!r}: give {', '.join(COMMANDS)}")
    sys.argv = [f"-m diffrl {name}", *words]
    if name == "list":
        _quick()
    else:
        run(name)


def run(name: str) -> None:
    """Run a command with the words in `sys.argv`; whenever Ctrl-C or SIGTERM come, it ends with a word."""
    numbers = (signal.SIGINT, signal.SIGTERM)
    old = {number: signal.signal(number, _leave) for number in numbers}
    try:
        from diffrl.configs import commands  # costs seconds

        signal.signal(signal.SIGINT, old[signal.SIGINT])
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: the command reports it
        commands.COMMANDS[name]()
    finally:
        for number in numbers:
            signal.signal(number, old[number])


def _quick() -> None:
    """The command `list`, for which torch is not imported."""
    from diffrl.configs.names import list_names
    from diffrl.configs.output import leave_quietly, write_utf8
    from diffrl.ranks import refuse_several_processes

    write_utf8()
    try:
        refuse_several_processes("the command list")
        list_names()
        sys.stdout.flush()
    except BrokenPipeError:
        leave_quietly()
    except DiffrlError as error:
        sys.exit(f"error: {error}")


def _leave(number: int, frame: FrameType | None) -> None:
    """While modules are imported, which may swallow an exception, and nothing can be lost."""
    print("error: interrupted", file=sys.stderr, flush=True)
    os._exit(1)


if __name__ == "__main__":
    main()
