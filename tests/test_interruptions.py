"""Runs that are killed for real, by SIGKILL: benchmarks/interruptions.py as it is."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "interruptions.py"


def test_twenty_kills():
    """Runs killed at random moments and resumed end with the bytes of an uncut one."""
    command = [sys.executable, str(SCRIPT), "--kills", "20", "--seed", "5"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.startswith("20 kills (")
    assert ", 0 did not" in done.stdout
