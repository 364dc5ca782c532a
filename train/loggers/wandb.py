"""Weights & Biases. Account, project and mode are those of its own variables, such as WANDB_PROJECT and WANDB_MODE."""

from collections.abc import Mapping
from pathlib import Path

from PIL import Image

from train.cli.files import read_run_config
from train.files import write_text

PACKAGE = "wandb"
ID_FILE = "wandb_id"  # in the folder of a run: its id there


class Writer:
    """Logs to one run of the service, which is named after the folder and goes on when the training is resumed.

    Its x axis is the training step: steps that are taken again after a resume from an earlier checkpoint are there
    twice. ValueError if the service refuses, for instance without a login.
    """

    def __init__(self, run: Path, start: int):
        import wandb

        path = run / ID_FILE
        known = path.read_text().strip() if start and path.is_file() else None  # without a checkpoint it starts anew
        options = {"id": known, "resume": "allow", "name": run.name, "dir": str(run), "allow_val_change": True}
        try:
            self.run = wandb.init(config=read_run_config(run / "config.yaml"), **options)
        except wandb.Error as error:
            reason = " ".join(str(error).split())
            raise ValueError(f"wandb refuses ({reason}): type `wandb login`, or set WANDB_MODE=offline") from error
        write_text(path, f"{self.run.id}\n")
        self.run.define_metric("*", step_metric="step")
        self.to_image = wandb.Image

    def log_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Logs one point of each curve."""
        self.run.log({"step": step, **values})

    def log_image(self, step: int, name: str, picture: Image.Image) -> None:
        """Logs a picture."""
        self.run.log({"step": step, name: self.to_image(picture)})

    def close(self) -> None:
        """Sends what is left."""
        self.run.finish()
