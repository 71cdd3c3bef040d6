"""The commands: python -m diffrl train|check|finetune|compare|sample WORDS..."""

import sys

USAGE = """\
usage: python -m diffrl COMMAND WORDS...

  train      train a denoiser by TD(λ), and by Monte Carlo beside it
  check      check a training run before it is started
  finetune   tune a denoiser for a reward, or compare methods of tuning
  compare    compare bootstrapping schemes over data sets and seeds
  sample     draw samples from a run folder

python -m diffrl COMMAND --help lists the words of each; --import MODULE makes methods of your own known.
"""


def main() -> None:
    """Run the command that the first word names."""
    name, words = (sys.argv[1] if len(sys.argv) > 1 else "--help"), sys.argv[2:]
    if name in ("-h", "--help"):
        print(USAGE, end="")
        return
    from diffrl.configs import commands  # costs seconds

    if name not in commands.COMMANDS:
        sys.exit(f"error: there is no command {name!r}: give {', '.join(commands.COMMANDS)}")
    sys.argv = [f"-m diffrl {name}", *words]
    commands.COMMANDS[name]()


if __name__ == "__main__":
    main()
