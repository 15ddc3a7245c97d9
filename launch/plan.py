"""``c2g plan``: memory, seconds per step and scaling of a training run, before it runs."""

from __future__ import annotations

import json
from pathlib import Path

from rich.console import Console

from hpc_c2g.files import write_atomically
from hpc_c2g.generators.config import GENERATORS
from hpc_c2g.planning.config import PlanConfig
from hpc_c2g.planning.hardware import HardwareSpec, LocalHardware, as_yaml
from launch._compose.cli import run_verb

HARDWARE = {"here": LocalHardware, "h100": HardwareSpec, "a100": HardwareSpec}


def plan(config: PlanConfig) -> None:
    """Predict, print the tables and the formulas with their numbers, and write the requested files."""
    from hpc_c2g.planning.plan import make_plan  # torch takes seconds to import: after the settings are checked
    from hpc_c2g.planning.report import formulas, memory_table, scaling_table, step_table

    made = make_plan(config)
    console = Console(width=130)
    measured = config.hardware_file is None and isinstance(config.hardware, LocalHardware)
    console.print(
        f"profile ({'measured here' if measured else 'as given'}):\n{as_yaml(made.hardware)}", highlight=False
    )
    for table in (memory_table(made), step_table(made), scaling_table(made, "strong"), scaling_table(made, "weak")):
        console.print(table)
    console.print(formulas(made), highlight=False, markup=False)
    if config.save_hardware is not None:
        write_atomically(Path(config.save_hardware), as_yaml(made.hardware).encode())
        print(f"written: {config.save_hardware} (use it with hardware_file={config.save_hardware})")
    if config.out is not None:
        write_atomically(Path(config.out), json.dumps(made.record(), indent=2).encode())
        print(f"written: {config.out}")


def main() -> None:
    """Run the verb."""
    run_verb("plan", PlanConfig, plan, {"generator": GENERATORS, "hardware": HARDWARE})


if __name__ == "__main__":
    main()
