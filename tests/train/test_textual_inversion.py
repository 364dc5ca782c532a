"""New words of a text encoder: alone and beside adapters, resumed, sampled from, and as files."""

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file, save_file

from helpers.captioned import write_captioned_images, write_encoder
from helpers.run_asserts import assert_equal_bits, saved_state, weights
from helpers.tiny_runs import DDPM, call
from train.inference import load
from train.optim import is_selected
from train.textual_inversion import parse_words, read_embeddings

FAST = DDPM.replace("--warmup_iters 100", "--warmup_iters 0")
RUN = f"{FAST} --attn_block_type transformer --no_amp --lr 1e-2 --weight_decay 0.1 --steps_per_eval 0 --keep_last 0"
WORDS = "--text_new_tokens <cat-toy>=dog <hat> --train_only new_tokens"
KEY = "network.encoders.text.encoder.token.new_tokens"
LORA = "--lora_rank 2 --lora_targets text"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    captions = ["a photo of <cat-toy>", "a <hat> on a dog", "<cat-toy> with <hat>"]
    return write_captioned_images(tmp_path_factory.mktemp("data"), captions)


def train(root, data, name, flags):
    common = f"--logs_root {root} --log_dir {name} {RUN} {data} --steps_per_checkpoint 1"
    call("train_sampler.py", f"{common} {flags}", validation_images=2)
    return root / name


@pytest.fixture(scope="module")
def logs(tmp_path_factory, data):
    """Logs with `base`, 4 steps with a frozen text encoder, and `words`, which learns two words for 2 steps."""
    logs = tmp_path_factory.mktemp("logs")
    encoder = write_encoder(logs / "encoder.safetensors")
    train(logs, data, "base", f"--train_steps 4 --conditions text --text_encoder {encoder}")
    train(logs, data, "words", f"--train_steps 2 --load_dir base {WORDS}")
    return logs


def network_state(run, ema=True):
    return load(run, ema=ema).model.sampler.network.state_dict()


def encode(run, caption):
    network = run.model.sampler.network
    return network.encoders["text"]([caption], torch.zeros(1, 3, 8, 8)).values


def test_new_words_are_all_that_learns_and_is_saved(logs):
    for file in ("model.safetensors", "ema.safetensors"):
        first, last = (weights(logs / "words", step, file) for step in (1, 2))
        assert first.keys() == last.keys() == {KEY} and first[KEY].shape == (2, 8)
        assert (first[KEY] != last[KEY]).any(1).all()
    (moments,) = saved_state(logs / "words", 2)["optimizers"]["network"]["state"].values()
    assert moments["exp_avg"].shape == (2, 8) and moments["exp_avg"].any(1).all()
    before, after = network_state(logs / "base"), network_state(logs / "words")
    assert_equal_bits(before, {key: value for key, value in after.items() if f"network.{key}" != KEY})


def test_the_words_are_stored_with_the_run(logs):
    stored = yaml.safe_load((logs / "words" / "config.yaml").read_text())
    assert stored["fine_tuning"]["text_new_tokens"] == ["<cat-toy>=dog", "<hat>"]
    assert stored["origin"]["base"]["path"] == "base"


def test_training_of_words_resumes_bitwise(logs, data, tmp_path):
    flags = f"--lr_schedule constant --load_dir {logs}/base {WORDS}"
    for name, steps in (("parts", 1), ("parts", 3), ("whole", 3)):
        train(tmp_path, data, name, f"--train_steps {steps} {flags}")
    for file in ("model.safetensors", "ema.safetensors"):
        assert_equal_bits(weights(tmp_path / "parts", 3, file), weights(tmp_path / "whole", 3, file))


def test_prompts_read_the_words(logs):
    tuned, base = load(logs / "words"), load(logs / "base")
    assert torch.equal(encode(tuned, "a dog"), encode(base, "a dog"))
    assert encode(tuned, "a <cat-toy>").shape == encode(tuned, "a dog").shape
    assert not torch.equal(encode(tuned, "a <cat-toy>"), encode(tuned, "a <hat>"))
    assert tuned.sample(1, caption="a photo of <cat-toy>", sample_steps=2).shape == (1, 3, 8, 8)
    flags = f"--sampler ddpm --load_dir words --logs_root {logs} --n_samples 1 --sample_steps 2 --no_amp"
    call("experiments/get_samples.py", f"{flags} --prompt <cat-toy> --log_dir samples")
    assert (logs / "samples" / "samples.png").is_file()


def test_files_of_words_give_another_run_the_words(logs):
    file, tuned, base = logs / "words" / "learned_embeds.safetensors", load(logs / "words"), load(logs / "base")
    averaged = weights(logs / "words", 2, "ema.safetensors")[KEY]
    assert_equal_bits(load_file(file), {"<cat-toy>": averaged[0], "<hat>": averaged[1]})
    assert base.add_words(file) == ["<cat-toy>", "<hat>"]
    assert torch.equal(encode(base, "<hat> on a <cat-toy>"), encode(tuned, "<hat> on a <cat-toy>"))
    with pytest.raises(ValueError, match="got the new word '<cat-toy>', which is in the vocabulary"):
        base.add_words(file)


@pytest.fixture(scope="module")
def several(logs, data):
    """A run that learns a word of three tokens and one of a single token."""
    return train(
        logs, data, "several", "--train_steps 2 --load_dir base --train_only new_tokens --text_new_tokens <a>=dog*3 <b>"
    )


def test_words_of_several_tokens_learn(several, logs):
    first, last = (weights(several, step)[KEY] for step in (1, 2))
    assert first.shape == (4, 8) and (first != last).any(1).all()
    averaged, file = weights(several, 2, "ema.safetensors")[KEY], several / "learned_embeds.safetensors"
    assert_equal_bits(load_file(file), {"<a>": averaged[:3], "<b>": averaged[3]})
    base, tuned = load(logs / "base"), load(several)
    assert base.add_words(file) == ["<a>", "<b>"]
    assert torch.equal(encode(base, "a <a> on <b>"), encode(tuned, "a <a> on <b>"))
    assert tuned.model.sampler.network.encoders["text"].encoder.tokenizer.encode("<a>") == [49408, 49409, 49410]


def test_files_of_words_are_a_flag_of_sampling(several, logs, capfd):
    """Their words draw what the run that learned them draws; the results of other files are others."""
    flags = f"--sampler ddpm --logs_root {logs} --n_samples 2 --sample_steps 2 --no_amp"
    files = {name: logs / name / "learned_embeds.safetensors" for name in ("several", "words")}
    by_file = f"{flags} --load_dir base --log_dir by_file --prompt <a> --textual_inversion"
    call("experiments/get_samples.py", f"{by_file} {files['several']} {files['words']}")
    assert f"words of {files['several']}, words of {files['words']}" in capfd.readouterr().out
    call("experiments/get_samples.py", f"{flags} --load_dir several --log_dir by_run --prompt <a>")
    drawn = [np.load(logs / name / "samples.npz")["arr_0"] for name in ("by_file", "by_run")]
    assert np.array_equal(*drawn)
    call("experiments/get_samples.py", f"{flags} --load_dir base --log_dir without --prompt <a>")
    assert not np.array_equal(drawn[0], np.load(logs / "without" / "samples.npz")["arr_0"])
    for words, message in (
        (files["words"], "--load_dir, --lora, --textual_inversion or --control_files: other weights"),
        (f"{files['words']} {files['words']}", "got the new word '<cat-toy>', which is in the vocabulary"),
        (logs / "none.pt", "none.pt not found"),
    ):
        with pytest.raises(SystemExit) as stop:
            call("experiments/get_samples.py", f"{by_file} {words}")
        assert stop.value.code == 2
        assert message in " ".join(capfd.readouterr().err.replace("│", " ").split())


def test_words_learn_beside_adapters_and_other_parts(logs, data, tmp_path):
    words = "--text_new_tokens <cat-toy> <hat>"
    for name, flags in (("lora", LORA), ("part", "--train_only conv_out"), ("all", "")):
        train(tmp_path, data, name, f"--train_steps 2 --load_dir {logs}/base {words} {flags}")
        rows = [weights(tmp_path / name, step)[KEY] for step in (1, 2)]
        assert (rows[0] != rows[1]).any(1).all()
    adapters = weights(tmp_path / "lora", 2)
    assert all(".adapters." in key for key in adapters.keys() - {KEY})
    assert all(value.any() for key, value in adapters.items() if key.endswith(".up"))
    assert weights(tmp_path / "part", 2).keys() == {KEY, "network.conv_out.weight", "network.conv_out.bias"}
    encoder = {key for key in weights(tmp_path / "all", 2) if ".text.encoder." in key}
    assert encoder == {KEY} and len(weights(tmp_path / "all", 2)) > 20


def test_words_of_a_file_of_a_text_encoder_need_no_base(logs, data, tmp_path):
    flags = f"--train_steps 2 --conditions text --text_encoder {logs}/encoder.safetensors --text_new_tokens <hat>"
    run = train(tmp_path, data, "new", flags)
    saved = weights(run, 2)
    assert {key for key in saved if ".text.encoder." in key} == {KEY}
    assert_equal_bits(saved, {key: network_state(run, ema=False)[key.removeprefix("network.")] for key in saved})


def test_a_merged_run_keeps_its_words(logs, data, tmp_path):
    flags = f"--train_steps 1 --load_dir {logs}/base {LORA} --text_new_tokens <hat> --save merged"
    run = train(tmp_path, data, "tuned", flags)
    merged = load(tmp_path / "tuned_merged")
    torch.testing.assert_close(encode(merged, "a <hat>"), encode(load(run), "a <hat>"))


def test_a_run_with_words_may_be_a_base(logs, data, tmp_path):
    flags = f"--load_dir {logs}/words --text_new_tokens <cat-toy> <hat> --train_only conv_out --lr 1e-9"
    run = train(tmp_path, data, "next", f"--train_steps 1 {flags}")
    assert weights(run, 1).keys() == {KEY, "network.conv_out.weight", "network.conv_out.bias"}
    torch.testing.assert_close(weights(run, 1)[KEY], weights(logs / "words", 2, "ema.safetensors")[KEY])
    torch.testing.assert_close(encode(load(run), "<hat> <cat-toy>"), encode(load(logs / "words"), "<hat> <cat-toy>"))


def test_a_smaller_base_keeps_its_words(logs, data, tmp_path):
    flags = f"--load_partial {LORA} --router_experts 2 --lr 1e-9 --train_steps 1"
    train(tmp_path, data, "own", f"{flags} --load_dir {logs}/words --text_new_tokens <cat-toy> <hat>")
    torch.testing.assert_close(encode(load(tmp_path / "own"), "<hat>"), encode(load(logs / "words"), "<hat>"))
    train(tmp_path, data, "new", f"{flags} --load_dir {logs}/base --text_new_tokens <hat>")
    assert weights(tmp_path / "new", 1)[KEY].shape == (1, 8)


REFUSED = {
    f"--conditions text {WORDS}": "without a trained text encoder: pass --load_dir RUN or --text_encoder FILE",
    "--load_dir base --text_new_tokens dog": "got the new word 'dog', which is in the vocabulary",
    "--load_dir base --text_new_tokens <a> <a>": "wanted each word once",
    "--load_dir base --text_new_tokens <a>=": "pass '<cat-toy>', '<cat-toy>=cat' or '<cat-toy>=cat*4'",
    "--load_dir base --text_new_tokens <a>=cat*0": "pass '<cat-toy>', '<cat-toy>=cat' or '<cat-toy>=cat*4'",
    "--load_dir base --text_new_tokens <a>=xqzwv": "tokens: wanted a word of one token",
    "--load_dir base --train_only new_tokens": "which matches no parameter",
    f"--load_dir words {LORA}": "has new words: pass just these, --text_new_tokens '<cat-toy>' '<hat>'",
    "--load_dir words --text_new_tokens <cat-toy> <hat> <third>": "has new words: pass just these",
    "--load_dir words --text_new_tokens <cat-toy> <hat>=*2": "has new words: pass just these",
    f"--load_dir base --load_partial {WORDS}": "got --load_partial with --text_new_tokens",
}


@pytest.mark.parametrize("flags", REFUSED)
def test_wrong_flags_are_refused(logs, data, flags, capfd):
    with pytest.raises(SystemExit) as stop:
        train(logs, data, "refused", f"--train_steps 1 {flags}")
    output = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert stop.value.code == 2 and REFUSED[flags] in output
    assert not (logs / "refused").exists()


def test_networks_without_captions_are_refused(tmp_path, capfd):
    common = f"--logs_root {tmp_path} {DDPM} --dataset digits --no_amp --train_steps 1"
    call("train_sampler.py", f"{common} --log_dir base")
    with pytest.raises(SystemExit):
        call("train_sampler.py", f"{common} --log_dir words --load_dir base {WORDS}")
    output = " ".join(capfd.readouterr().err.replace("│", " ").split())
    assert "got new words for a network that reads no captions" in output


def test_new_tokens_are_a_part():
    names = [KEY, "network.new_tokens.weight", "network.token.weight"]
    assert [is_selected(name, ["new_tokens"]) for name in names] == [True, False, False]
    words = parse_words(["<a>", "<b>=dog", "<c>=dog*3", "<d>=*2", "<e>=*"])
    assert words == {"<a>": ("", 1), "<b>": ("dog", 1), "<c>": ("dog", 3), "<d>": ("", 2), "<e>": ("*", 1)}


def test_files_of_others_are_read(tmp_path):
    row = torch.arange(4.0)
    save_file({"<a>": row, "<b>": row + 1}, tmp_path / "learned_embeds.safetensors")
    torch.save({"<a>": row.half()}, tmp_path / "learned_embeds.bin")
    save_file({"emb_params": row[None]}, tmp_path / "mine.safetensors")
    save_file({"emb_params": torch.stack([row, row + 1])}, tmp_path / "two.safetensors")
    web_ui = {"string_to_token": {"*": 265}, "string_to_param": {"*": row[None]}, "name": "other", "step": 100}
    torch.save(web_ui, tmp_path / "mine.pt")
    read = {path.name: read_embeddings(path) for path in tmp_path.iterdir()}
    assert_equal_bits(read["learned_embeds.safetensors"], {"<a>": row, "<b>": row + 1})
    assert_equal_bits(read["learned_embeds.bin"], {"<a>": row})
    assert_equal_bits(read["mine.safetensors"], {"mine": row})
    assert_equal_bits(read["mine.pt"], {"mine": row})
    assert_equal_bits(read["two.safetensors"], {"two": torch.stack([row, row + 1])})


class Code:
    def __reduce__(self):
        return print, ("run",)


def test_other_files_are_refused(tmp_path, capfd):
    damaged = {
        "deep.safetensors": lambda path: save_file({"emb_params": torch.zeros(2, 3, 4)}, path),
        "nan.safetensors": lambda path: save_file({"<a>": torch.full((4,), torch.nan)}, path),
        "no.safetensors": lambda path: path.write_bytes(b"zip" * 9),
        "empty.pt": lambda path: torch.save({}, path),
        "list.pt": lambda path: torch.save([torch.zeros(4)], path),
        "words.pt": lambda path: torch.save({"<a>": "text"}, path),
        "code.pt": lambda path: torch.save({"<a>": Code()}, path),
    }
    for name, write in damaged.items():
        write(tmp_path / name)
        with pytest.raises(ValueError, match=name):
            read_embeddings(tmp_path / name)
    assert "run" not in capfd.readouterr().out
    with pytest.raises(FileNotFoundError, match="gone.pt not found"):
        read_embeddings(tmp_path / "gone.pt")
