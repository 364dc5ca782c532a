"""Bits that a VQGAN's decoder takes for images given their codes, by a head that is trained where it is missing."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from train.checkpoint import saved_steps
from train.cli import plain
from train.config import LoggingConfig, TrainingConfig
from train.data import ImageSource, TrainingCodes
from train.decoder_likelihood import HeadRun, TrainedHead, load_head, train_head
from train.generate import TrainedSampler, check_allowed
from train.loop import Batch
from train.runs import open_run, run_folder
from train.transforms import training_views


def head_for(config, trained: TrainedSampler) -> TrainedHead | None:
    """The head of the VQGAN that a sampler of codes stands on, trained first as far as it is not; None without codes,
    or where none is asked for. All processes take part."""
    if not config.decoder.decoder or not trained.space.tokens:
        return None
    first, world = trained.space.first, trained.world
    name = config.decoder.head_dir or f"likelihood_{first.run.name}_{first.step}"
    run = run_folder(config.output.logs_root, name)
    wanted, done = head_run(config, trained, run), max(saved_steps(run), default=0)
    world.barrier()  # all have looked before one trains
    try:
        if done < wanted.training.train_steps:
            print(f"training the decoder's head, {done} of {wanted.training.train_steps} steps are done", flush=True)
            train_head(run, first, wanted, world)
        elif world.is_main:
            open_run(run, wanted, first.origin)
        world.barrier()
        return load_head(run, first)
    except ValueError as error:
        raise ValueError(f"the decoder's head, whose folder is --head_dir: {error}") from error


def head_run(config, trained: TrainedSampler, run: Path) -> HeadRun:
    """The run of a head, on the images that its VQGAN was trained on.

    ValueError where these are brought by a command that --allow does not name.
    """
    first, c, output = trained.space.first, config.decoder, config.output
    reader = first.reader
    if config.model.data_dir is not None:
        reader = replace(reader, data_dir=config.model.data_dir)
    check_allowed(first.run, {"sampler": {}, "reader": plain(reader)}, config.model.allow)
    training = TrainingConfig(
        train_steps=c.train_steps, batch_size=c.train_batch_size, lr=c.lr, amp=False, device=output.device
    )
    logging = LoggingConfig(log_dir=run.name, logs_root=output.logs_root, steps_per_eval=c.steps_per_eval)
    return HeadRun(data=first.data, reader=reader, training=training, logging=logging)


class DecoderBits:
    """Bits per dimension of the images, in their views, that codes of a split were made of, given these codes."""

    def __init__(self, head: TrainedHead, trained: TrainedSampler, split: str, codes: TrainingCodes):
        dataset, data = trained.dataset(split), trained.data
        if split != "train":
            data = data.in_one_view
        self.head, self.codes, self.views = head, codes, training_views(data)
        self.images = ImageSource(dataset, data, margin=data.crop_margin)
        self.index = head.first.codes(dataset, split, data, 1, trained.world).index  # in the cache already

    def image(self, position: int) -> Tensor:
        """uint8 (C, H, W)."""
        view, row = divmod(self.codes.order[position], len(self.index))
        return self.views[view](self.images[int(self.index[row])]["image"]).as_subclass(Tensor)

    def __call__(self, batch: Batch) -> Tensor:
        """A batch of the codes -> (B,)."""
        images = torch.stack([self.image(position) for position in batch["position"].tolist()])
        return self.head.bits_per_dim(batch["codes"], images)


def of_images(codes: Tensor, decoder: Tensor, tokens: int, dimensions: int, head: TrainedHead) -> dict[str, Any]:
    """What results.json says of whole images: -log2 p(x) <= -log2 p(x | z) - log2 p(z), z the codes of x.

    codes (n,) bits per code, of `tokens` codes; decoder (n,) bits per dimension, of `dimensions` numbers.
    """
    of_codes = codes * tokens / dimensions
    total = of_codes + decoder
    return {
        "bits_per_dim": total.mean().item(),
        "bits_per_dim_standard_error": total.std().item() / len(total) ** 0.5 if len(total) > 1 else None,
        "codes_bits_per_dim": of_codes.mean().item(),
        "decoder_bits_per_dim": decoder.mean().item(),
        "head": {"run": head.run.name, "step": head.step},
    }


def report_rows(results: dict[str, Any]) -> list[tuple[str, str]]:
    """The rows that a person reads of it."""
    error = results["bits_per_dim_standard_error"]
    return [
        ("", "bits per dimension"),
        ("codes, by the sampler", f"{results['codes_bits_per_dim']:.4f}"),
        ("image given its codes, by the decoder", f"{results['decoder_bits_per_dim']:.4f}"),
        ("image", f"{results['bits_per_dim']:.4f}" + ("" if error is None else f" ± {error:.4f}")),
    ]
