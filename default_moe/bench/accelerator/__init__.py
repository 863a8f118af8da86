"""Everything worth knowing about one accelerator, in one command of less than nine minutes.

Each part runs in a process of its own with a limit on its time, and writes each result when it has it: a part that
crashes, hangs or runs out of memory loses nothing but what it had not measured yet.
"""

from default_moe.bench.accelerator.parts import FAILED, PARTS, run, run_part

__all__ = ["FAILED", "PARTS", "run", "run_part"]
