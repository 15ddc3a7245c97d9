"""An evaluation in TensorBoard: a separate run, because it *uses real data* and the training beside it must not."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from hpc_c2g.files import writing
from hpc_c2g.monitoring.event_file import EVALUATION
from hpc_c2g.monitoring.run_log import add_scalars


def log_evaluation(
    run_dir: Path, step: int, scalars: Mapping[str, float], pictures: Mapping[str, Tensor], texts: Mapping[str, str]
) -> None:
    """Replace the TensorBoard run of an earlier evaluation.

    Args:
        run_dir: Run directory.
        step: Step of the evaluated checkpoint.
        scalars: Scalars by name.
        pictures: Pictures ``[channels, H, W]`` in 0..1 of real images beside generated ones, by name.
        texts: Markdown texts by name.

    Raises:
        UserError: It cannot be written.
    """
    from torch.utils.tensorboard import SummaryWriter  # slow to import

    with writing(run_dir / EVALUATION), SummaryWriter(str(run_dir / EVALUATION), purge_step=0) as board:
        add_scalars(board, {f"uses_real_data/{name}": value for name, value in scalars.items()}, step)
        for name, picture in pictures.items():
            board.add_image(f"uses_real_data/{name}", picture, step)
        for name, text in texts.items():
            board.add_text(f"uses_real_data/{name}", text, step)
