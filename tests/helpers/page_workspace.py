"""A folder in which the commands of docs/coming_from.md run: data, weights and trained runs by the page's names."""

import json
import re
import shlex
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from experiments.metrics.layout import crop_classifier, obedience, scene_network
from helpers import tiny_regions, tiny_sd
from helpers.tiny_runs import ROOT, UNET, call
from helpers.unleashing_layout import build_vqgan, sampler_weights, to_unleashing_weights

TRAINING = (
    "--train_steps 2 --lr_schedule constant --batch_size 4 --accumulate 1 --steps_per_eval 0 --num_workers 0 --no_amp"
)
VQGAN = (
    f"{TRAINING} --nf 4 --ch_mult 1 2 2 --emb_dim 4 --codebook_size 16 --img_size 16 --ndf 4 --disc_layers 1 "
    "--perceptual_net none"
)
CODES = f"{TRAINING} --bert_n_emb 16 --bert_n_head 2 --bert_n_layers 1 --warmup_iters 2"
PIXELS = f"{TRAINING} {UNET} --img_size 16 --total_steps 50 --warmup_iters 2 --sample_steps 2"
TUNING = f"{TRAINING} --img_size 16 --warmup_iters 0 --sample_steps 2"
TUNING_SD = f"{TUNING} --img_size 32 --batch_size 2"
SAMPLING = "--n_samples 4 --sample_steps 2 --no_amp"
DISTANCE = "--features pixels --no_amp"
SMALL = {  # flags for a second's work, by script
    "get_samples.py": SAMPLING,
    "run_layout_to_image.py": "--n_seeds 1 --sample_steps 2 --no_amp",
    "run_panoptic_to_image.py": "--n_seeds 1 --sample_steps 2 --no_amp",
    "generate_big_samples.py": "--shape 6 5 --n_samples 1 --sample_steps 2 --no_amp",
    "inpaint.py": "--n_images 2 --sample_steps 2 --no_amp",
    "edit.py": "--n_images 2 --sample_steps 2 --no_amp",
    "edit_layout.py": "--n_images 2 --sample_steps 2 --no_amp",
    "calc_FID.py": f"--n_samples 8 {DISTANCE}",
    "calc_PRDC.py": f"--n_samples 8 {DISTANCE}",
    "calc_VQGAN_FID.py": f"--n_images 4 --lpips_net none {DISTANCE}",
    "calc_nearest_neighbours.py": f"{SAMPLING} --rerank pixels --features pixels",
    "calc_approximate_ELBO.py": "--n_images 2 --calls 2 --train_steps 2 --steps_per_eval 2 --no_amp",
    "ablate.py": "--n_images 1 --measures seconds --no_amp",
    "calc_pairs.py": "--lpips none",
    "calc_layout.py": "--min_judge 0 --n_images 8",
    "compare_samplers.py": "--n_samples 4 --solvers ddpm:4 dpmpp_2m:2 --features pixels --no_amp",
    "check_data.py": "--check_items 4 --sheet_items 2",
}
PHOTOS = "photos"  # the folder of data sets that a user names in datasets.yaml
SD_FILE = "--heads 4 --prediction eps --img_size 32 --no_amp"  # what the tiny file of weights does not say
CONVERSIONS = {  # flags of convert.py, by a word of its command
    **{
        "--to": "",
        "control": "",
        "v1-5": SD_FILE,
        "instruct": SD_FILE,
        "vqgan_ema": "--img_size 16 --num_workers 0 --no_amp",
    },
    "absorbing_ema": "--bert_n_head 3 --num_workers 0 --no_amp",
}
RECIPES = ((crop_classifier, "RECIPE"), (scene_network, "RECIPE"), (obedience, "CAS_RECIPE"))  # of judges
FOR_WORDS = {  # flags of train_sampler.py, by a word of its command
    "neighborhood": "--kernel_sizes 3 --dilations 1",
    "shapes": "--shapes_count 40",
    "text": "--text_width 16 --text_layers 1 --text_heads 2",
    "configs/mnist_unet.json": "--head_width 8",
    "--steps_per_FD": "--steps_per_FD 2 --FD_samples 8 --FD_features pixels",
}
NEEDED = {  # what a word needs beside itself
    **{"ffhq": (PHOTOS,), "churches": (PHOTOS,), "configs/sd_curriculum.yaml": ("sd15",)},
    "configs/ablation/digits.yaml": ("absorbing_digits", "ddpm_digits"),
}
NOT_READ = {  # flags whose value a command writes, or is no file or run
    *("--log_dir", "--output", "--output_dir", "--out", "--crops", "--conditions", "--dataset"),
}


def save_photos(folder: Path, *, class_names: tuple[str, ...] = ("hat", "shoe")) -> None:
    """Writes twelve photographs of each split, in folders of classes."""
    for split in ("train", "val"):
        for number in range(12):
            pixels = np.random.default_rng(number).integers(0, 255, (16, 20, 3), dtype=np.uint8)
            path = folder / split / class_names[number % len(class_names)] / f"{number}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels).save(path)


def save_captions(folder: Path) -> None:
    """Writes images with captions in two files, of which one is for a share of the visits."""
    tiny_regions.save_captions(folder)
    for split in tiny_regions.TREES:
        text = (folder / f"prompts_{split}.csv").read_text()
        (folder / f"short_{split}.csv").write_text(text.replace("left", "a picture"))


def save_pictures(folder: Path) -> None:
    """Writes twelve images with a text file beside each."""
    save_photos(folder, class_names=("",))
    for path in [*folder.rglob("*.png")]:
        path.rename(folder / f"{path.parent.name}_{path.name}").with_suffix(".txt").write_text("a street\n")


def save_arrays(folder: Path) -> None:
    """Writes images of five channels of 16 bits."""
    folder.mkdir()
    for number in range(8):
        array = np.random.default_rng(number).integers(0, 4096, (16, 16, 5), dtype=np.uint16)
        np.save(folder / f"{number}.npy", array)


def save_mnist(folder: Path) -> None:
    """Writes the four IDX files with a few images."""
    folder.mkdir()
    for prefix, count in (("train", 12), ("t10k", 4)):
        for name, shape in (("images-idx3", (count, 28, 28)), ("labels-idx1", (count,))):
            header = bytes([0, 0, 8, len(shape)]) + b"".join(size.to_bytes(4, "big") for size in shape)
            values = np.arange(np.prod(shape)) % 10
            (folder / f"{prefix}-{name}-ubyte").write_bytes(header + values.astype(np.uint8).tobytes())


def save_lines(folder: Path) -> None:
    """Writes layouts of `shapes` as lines x,y,w,h,class."""
    folder.mkdir()
    for name, line in (("one", "0.1,0.1,0.4,0.5,disc"), ("two", "0.9,0.9,-0.5,-0.5,ring")):
        (folder / f"{name}.txt").write_text(f"{line}\n")


def save_maps(folder: Path) -> None:
    """Writes panoptic maps of MaMoE, with the classes beside them."""
    source = tiny_regions.save_panoptic_folder(folder.with_name("source_of_maps")) / "panoptic"
    (source / "train").rename(folder)
    categories = json.loads((source / "train.json").read_text())["categories"]
    (folder / "categories.json").write_text(json.dumps(categories))


def save_segmented(folder: Path) -> None:
    """Writes images, semantic maps of classes of Cityscapes, and maps of the numbers of instances."""
    car, vegetation = 13, 8
    for number, name in enumerate(tiny_regions.TREES["train"]):
        tiny_regions.save_picture(folder / "images" / f"{name}.png", number)
        semantic = np.array([255, car, vegetation], np.uint8)[tiny_regions.IDS]
        tiny_regions.save_picture(folder / "masks" / f"{name}.png", semantic)
        tiny_regions.save_picture(folder / "instances" / f"{name}.png", (tiny_regions.IDS == 1).astype(np.uint8))


def save_sat(folder: Path) -> None:
    """Writes a folder of diffusers whose UNet has the seven embedders of DiffusionSat."""
    parts = tiny_sd.tiny_parts("folder")
    parts["unet"] |= load_file(ROOT / "tests/fixtures/diffusionsat/weights.safetensors")
    unet = tiny_sd.CONFIGS["unet"] | {"_class_name": "SatUNet", "use_metadata": True, "num_metadata": 7}
    tiny_sd.write_folder(folder, parts, tiny_sd.CONFIGS | {"unet": unet})


def save_instruct(path: Path) -> None:
    """Writes a file of torch whose UNet has eight input channels."""
    tensors = tiny_sd.write_single_file(path.with_suffix(".safetensors"))
    name = "model.diffusion_model.input_blocks.0.0.weight"
    tensors[name] = torch.cat([tensors[name], tensors[name]], 1)
    torch.save({"state_dict": tensors}, path)


def save_fill50k(folder: Path) -> None:
    """Writes pairs of images with prompts in a list."""
    rows = [{"source": f"source/{i}.png", "target": f"target/{i}.png", "prompt": f"a circle {i}"} for i in range(12)]
    for i, row in enumerate(rows):
        for place in ("source", "target"):
            tiny_regions.save_picture(folder / row[place], i)
    (folder / "prompt.json").write_text("".join(f"{json.dumps(row)}\n" for row in rows))


def save_visual_genome(folder: Path) -> None:
    """Writes Visual Genome as sg2im prepares it."""
    h5py = pytest.importorskip("h5py")

    def save(path: Path, arrays: dict[str, np.ndarray]) -> None:
        with h5py.File(path, "w") as file:
            for name, array in arrays.items():
                file[name] = array

    tiny_regions.save_visual_genome(folder, save)


def save_clip(folder: Path) -> None:
    """Writes a folder of CLIP."""
    pytest.importorskip("transformers")
    from helpers import tiny_clip

    tiny_clip.save_clip(folder, tiny_clip.make_clip())


def save_prompts(path: Path, **item: object) -> None:
    path.write_text(json.dumps([{"prompt": "a street", **item}]))


METADATA = [4.1, 51.9, 0.5, 0.1, 2018, 7, 1]  # longitude, latitude, metres per pixel, clouds, year, month, day
SETTINGS = {"num_inference_steps": 2, "guidance_scale": 2.0, "height": 32, "width": 32}
MADE: dict[str, Callable[[Path], object] | str] = {  # how to make what a name of the page stands for: files, and runs
    **{"photos": save_photos, "generated": save_photos, "faces": lambda path: save_photos(path, class_names=("real",))},
    **{"captions": save_captions, "pictures": save_pictures, "arrays": save_arrays, "mnist": save_mnist},
    **{"lines": save_lines, "maps": save_maps, "segmented": save_segmented, "mine": tiny_regions.save_panoptic_folder},
    **{"coco": tiny_regions.save_coco, "nuimages": tiny_regions.save_nuimages, "xbd": tiny_regions.save_xbd},
    **{"CelebAMask-HQ": tiny_regions.save_celebamask, "fmow": tiny_regions.save_fmow},
    **{"vg": save_visual_genome, "fill50k": save_fill50k, "instruct-pix2pix-00-22000.ckpt": save_instruct},
    "clip": save_clip,
    "batch.json": lambda path: save_prompts(path, model_name="satellite", metadata=METADATA, output="a.png"),
    "samples.json": lambda path: save_prompts(path, output_path="a.png", **SETTINGS),
    "prompts.txt": lambda path: path.write_text("a dog\na cat negative=blurry\n"),
    "models.yaml": lambda path: path.write_text("satellite: sat\n"),
    "vqgan_ema_2200000.th": lambda path: torch.save(to_unleashing_weights(*build_vqgan()), path),
    "absorbing_ema_2000000.th": lambda path: torch.save(sampler_weights("absorbing"), path),
    "v1-5-pruned-emaonly.safetensors": tiny_sd.write_single_file,
    "sd-controlnet-canny": tiny_sd.write_control_folder,
    "stable-diffusion-2-1": tiny_sd.write_pipeline,
    "diffusionsat": save_sat,
    "geodiffusion-nuimages-time-weather-512x512": tiny_sd.write_geodiffusion,
    "vqgan_churches": "convert.py --from unleashing --weights vqgan_ema_2200000.th --dataset churches",
    "vqgan_ffhq": "convert.py --from unleashing --weights vqgan_ema_2200000.th --dataset ffhq",
    "absorbing_churches": "convert.py --from unleashing --weights absorbing_ema_2000000.th --dataset churches "
    "--ae_load_dir vqgan_churches",
    "absorbing_ffhq": "train_sampler.py --sampler absorbing --dataset ffhq --ae_load_dir vqgan_ffhq",
    "ddpm_photos": "train_sampler.py --sampler ddpm --dataset folder --data_dir photos --label_from folder",
    "ddpm_plain": "train_sampler.py --sampler ddpm --dataset shapes",
    "ddpm_shapes": "train_sampler.py --sampler ddpm --dataset shapes --conditions layout",
    "ddpm_panoptic": "train_sampler.py --sampler ddpm --dataset panoptic_folder --data_dir mine --conditions layout "
    "--layout_regions segments",
    "samples_shapes": "experiments/get_samples.py --sampler ddpm --load_dir ddpm_shapes",
    "sd15": "convert.py --from sd --weights v1-5-pruned-emaonly.safetensors",
    "sd21": "convert.py --from sd --weights stable-diffusion-2-1",
    "sd_512": "train_sampler.py --sampler ddpm --config configs/sd_curriculum.yaml --data_dir pictures",
    "instruct": "convert.py --from sd --weights instruct-pix2pix-00-22000.ckpt",
    "samples_sd15": "experiments/get_samples.py --sampler ddpm --load_dir sd15 --prompt dog",
    "vqgan_digits": "train_vqgan.py --dataset digits --shift 0",
    "absorbing_digits": "train_sampler.py --sampler absorbing --dataset digits --ae_load_dir vqgan_digits",
    "ddpm_digits": "train_sampler.py --sampler ddpm --dataset digits",
    "sat": "convert.py --from sd --weights diffusionsat",
    "geo": "convert.py --from sd --weights geodiffusion-nuimages-time-weather-512x512",
}


def words(command: str) -> list[str]:
    """Returns the words of a command from its script on, without `python`, or `torchrun` with its flags."""
    everything = shlex.split(command)
    return everything[next(i for i, word in enumerate(everything) if word.endswith(".py")) :]


class Workspace:
    """The folder, in which a name of `MADE` gets what it stands for when a command first has it as a word."""

    def __init__(self, folder: Path):
        self.folder, self.made, self.count = folder, set(), 0
        for name in ("configs", "assets"):
            (folder / name).symlink_to(ROOT / name)

    def run(self, command: str, name: str | None = None) -> None:
        """Runs a command with flags for small networks, after making what it names; `name` is that of its folder."""
        script, *flags = words(command)
        for word in inputs(flags):
            self.make(word)
        self.count += 1
        more = [*small_flags(script, flags), *folder_flags(script, flags, name or f"row_{self.count}")]
        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(self.folder)
            for module, recipe in RECIPES:
                patch.setattr(module, recipe, getattr(module, recipe)._replace(steps=2))
            call(script, [*flags, *more], validation_images=4)

    def make(self, word: str) -> None:
        """Makes what a name of `MADE` stands for, once."""
        if word not in self.made:
            self.made.add(word)
            maker = MADE[word]
            if isinstance(maker, str):
                self.run(f"python {maker}", word)
            else:
                maker(self.folder / word)


def is_resumed(flags: list[str]) -> bool:
    """Whether a command of train_sampler.py names no more than a run."""
    return flags[0] == "--log_dir"


def inputs(flags: list[str]) -> list[str]:
    """Returns the names of `MADE` that a command reads, in its order."""
    read = [word for i, word in enumerate(flags) if i == 0 or flags[i - 1] not in NOT_READ or is_resumed(flags)]
    parts = [part for word in read for part in re.split("[/=]", word)]
    parts += [part for word in flags for part in NEEDED.get(word, ())]
    return [part for part in dict.fromkeys(parts) if part in MADE]


def small_flags(script: str, flags: list[str]) -> list[str]:
    """Returns the flags that make a command small."""
    name, text = Path(script).name, " ".join(flags)
    if name == "train_vqgan.py":
        small = VQGAN
    elif name == "train_sampler.py":
        small = sampler_flags(flags)
    elif name == "convert.py":
        small = next((small for word, small in CONVERSIONS.items() if word in text), "--no_amp")
    else:
        small = SMALL.get(name, "").replace("--features pixels", "" if "--features" in flags else "--features pixels")
    if name != "convert.py" and "--data_dir" not in flags and {"ffhq", "churches"} & {*flags}:
        small += f" --data_dir {PHOTOS}"
    return small.split()


def sampler_flags(flags: list[str]) -> str:
    """Returns the flags of a small run of train_sampler.py: resumed, fine-tuned, of pixels or of codes."""
    if is_resumed(flags):
        return "--train_steps 3 --num_workers 0"
    if "--load_dir" in flags or "configs/sd_curriculum.yaml" in flags:
        small = TUNING if "ddpm_plain" in flags else TUNING_SD
    else:
        small = PIXELS if "ddpm" in flags else CODES
    return " ".join([small, *(more for word, more in FOR_WORDS.items() if word in flags)])


def folder_flags(script: str, flags: list[str], name: str) -> list[str]:
    """Returns the flags for the folder of the results, which are those of the command where it names another."""
    if script.endswith("make_panoptic.py"):
        return []
    own = is_resumed(flags) or "--output_dir" in flags or "--to" in flags
    return ["--logs_root", "logs", *([] if own else ["--log_dir", name])]
