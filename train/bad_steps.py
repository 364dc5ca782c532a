"""Steps whose loss or gradient was not finite: counted, their batches kept, and too many of them end the run."""

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from train.distributed import World
from train.files import refused
from train.loop import Batch, State

RECENT = 1_000  # steps among which they are counted


class BadSteps:
    """What `fit` tells of a skipped step."""

    def __init__(self, run: Path, world: World, most: int):
        self.run, self.world, self.most = run, world, most

    def __call__(self, state: State, parts: Sequence[Batch]) -> None:
        """Saves the batch of all processes as bad_steps/step_<step>.safetensors; ValueError where there were too many.

        A float16 loss scale that was too high is no bad step: it is lowered.
        """
        if "loss_scale" in state.extras and not state.extras["loss_scale"].exhausted:
            return
        state.bad_steps.append(state.step)
        recent = [step for step in state.bad_steps if step > state.step - RECENT]
        path = self.run / "bad_steps" / f"step_{state.step:08d}.safetensors"
        self.keep(path, parts)
        if self.world.is_main:
            print(
                f"step {state.step} skipped, loss or gradient is not finite ({len(recent)} lately): {path}", flush=True
            )
        if len(recent) > self.most:
            raise ValueError(
                f"{len(recent)} of the last {RECENT} steps were not finite, --max_bad_steps allows {self.most}: "
                f"look at the batches in {path.parent}, lower --lr, or train with --no_amp"
            )

    def keep(self, path: Path, parts: Sequence[Batch]) -> None:
        """The fields of the whole batch, in no particular order: "position" says which samples they are."""
        device = self.world.device
        batch = {
            name: self.world.gather(torch.cat([part[name] for part in parts]).to(device)).cpu() for name in parts[0]
        }
        if self.world.is_main:
            path.parent.mkdir(exist_ok=True)
            with refused(path):
                save_file({name: tensor.contiguous() for name, tensor in batch.items()}, path)
