"""What tests of both environments look at."""

import subprocess
import sys
from pathlib import Path

from diffrl import keys
from tests.kit.paths import ROOT

FLAGS = (keys.TERMINATED, keys.TRUNCATED, keys.DONE)


def printed_by(code: str, folder: Path) -> str:
    """What a bare script prints that knows no more than where the library is; warnings are errors."""
    command = [sys.executable, "-W", "error", "-c", code]
    environment = {"PYTHONPATH": str(ROOT), "PATH": ""}
    ran = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    return ran.stdout
