"""The help of `omnimix TASK fit`: the options that people use, in groups; and which option is meant by another name."""

from __future__ import annotations

import sys

Row = tuple[str, str]
_DATA: dict[str, list[Row]] = {
    "vision": [
        ("--data PATH", "a folder of images by class, tables, shards, or a .safetensors file of tensors"),
        ("--data.size N", "side of the images in pixels"),
        ("--data.augment.flip BOOL", "whether images are mirrored at random"),
    ],
    "video": [
        ("--data PATH", "a folder of clips by class, tables, or shards"),
        ("--data.clip.frames N", "frames of a clip"),
        ("--data.clip.size N", "side of the frames in pixels"),
    ],
    "audio": [
        ("--data PATH", "a folder of audio files by class, tables, shards, or Speech Commands"),
        ("--data.rate N", "samples a second"),
        ("--data.seconds X", "duration of a clip"),
    ],
    "text": [
        ("--data PATH", "a text, or a folder of .txt, .md, .jsonl, .parquet or .tar files"),
        ("--data.tokenizer NAME", "bpe (trained on the text), bytes, or a folder or tokenizer.json"),
        ("--data.vocab_size N", "size of a tokenizer that is trained"),
        ("--data.length N", "tokens of a training sequence"),
        ("--data.val_fraction X", "fraction of the documents that is held out"),
    ],
}
_MODEL: dict[str, list[Row]] = {
    "vision": [("--model.patch N", "side of a patch in pixels")],
    "video": [
        ("--model.tokens.tubelet LIST", "frames, height and width of a token"),
        ("--model.causal BOOL", "stream"),
    ],
    "audio": [("--model.front NAME", "patches, frames or wave; --model.front.OPTION sets its options")],
    "text": [
        ("--model.objective NAME", "causal, masked or block diffusion, sedd; --model.objective.OPTION"),
        ("--model.prompts LIST", "texts that the samples over time continue"),
    ],
}
_CLASSIFIER: list[Row] = [
    ("--model.training.label_smoothing X", "fraction of the target that is spread over all classes")
]


def short_help(argv: list[str], task: str, command: str) -> list[str]:
    """Print the short help of a fit where it is asked for, and end; for `--help all` the command line with `--help`.

    Raises:
        SystemExit: the help is printed.
    """
    for i, word in enumerate(argv):
        option, _, value = word.partition("=")
        if option not in ("--help", "-h"):
            continue
        if "all" in (value, *argv[i + 1 : i + 2]):
            return [*argv[:i], "--help"]
        if command == "fit" and not value:
            sys.stdout.write(text(task))
            raise SystemExit(0)
    return argv


def groups(task: str) -> dict[str, list[Row]]:
    """The options that the short help shows, with what they do, by group."""
    return {
        "data": [
            *_DATA[task],
            ("--data.batch_size N", "samples a step, on each device"),
            ("--data.workers N", "processes that read ahead"),
            ("--config NAME|FILE", "a packaged configuration (omnimix list recipes) or your own"),
        ],
        "model": [
            ("--model.mixer NAMES", "gla, mamba2, attention ...; 'gla,gla,attention' and 'attention+gla' are hybrids"),
            ("--model.dim N", "width"),
            ("--model.depth N", "number of blocks"),
            ("--model.ffn NAME", "swiglu, mlp, moe ...; --model.ffn.experts 16 sets an option of it"),
            ("--model.mixers.NAME.OPTION X", "an option of a mixer, as --model.mixers.gla.heads 4"),
            ("--model.scan NAME", "forward, bidirectional, cross ..."),
            ("--model.drop_path X", "rate of stochastic depth"),
            *_MODEL[task],
            ("--init RUN|FILE", "start with the weights of a run, a saved model or a file"),
        ],
        "training": [
            ("--trainer.max_epochs N", "passes over the data"),
            ("--trainer.max_steps N", "steps, where that is less"),
            ("--model.training.lr X", "peak of the learning rate"),
            ("--model.training.optimizer NAME", "adamw or muon"),
            ("--model.training.weight_decay X", "of matrices"),
            ("--model.training.warmup X", "fraction of the steps over which the rate rises"),
            ("--model.training.ema X", "decay of the averaged weights; 0 is none"),
            ("--model.training.freeze NAMES", "what stays as it is: backbone,tokenizer trains the head alone"),
            ("--model.training.layer_decay X", "factor on the rate from each block to the one before"),
            *([] if task == "text" else _CLASSIFIER),
            ("--trainer.precision NAME", "32-true, bf16-mixed ..."),
            ("--trainer.accelerator NAME", "cpu, gpu ..."),
            ("--trainer.devices N", "how many; --trainer.strategy fsdp2 shards the weights"),
            ("--trainer.accumulate_grad_batches N", "batches a step"),
        ],
        "run": [
            ("--name NAME", "of the run, its folder under --runs"),
            ("--runs DIR", "the folder that holds the runs"),
            ("--resume", "continue the run from its last saved state"),
            ("--overwrite", "delete an older run of this name first"),
            ("--dry_run", "print the plan; train and write nothing"),
            ("--seed_everything N", "seed of weights, order and augmentation"),
            ("--threads N", "processor threads of each process"),
        ],
    }


def text(task: str) -> str:
    """The short help of a recipe."""
    lines = [f"usage: omnimix {task} fit [--data PATH] [OPTIONS]", ""]
    for name, rows in groups(task).items():
        lines += [f"{name}:", *(f"  {option:<35} {what}" for option, what in rows), ""]
    lines += ["Every option, with its default: --help all. Options of one data set: --data.help=NAME."]
    return "\n".join(lines) + "\n"


def _all(place: str, names: str) -> dict[str, str]:
    return dict.fromkeys(names.split(), place)


# What options are called elsewhere -> what they are called here.
MEANT = {
    **_all("--model.dim", "width hidden_size hidden_dim embed_dim d_model n_embd model_dim dim"),
    **_all("--model.depth", "layers num_layers n_layer n_layers num_hidden_layers blocks depth"),
    **_all("--model.mixer", "mixer mixers attention attn arch architecture"),
    **_all("--model.mixers.NAME.heads", "heads num_heads n_head n_heads num_attention_heads"),
    **_all("--model.drop_path", "dropout drop drop_rate drop_path drop_path_rate"),
    **_all("--model.patch", "patch patch_size"),
    **_all("--model.training.lr", "lr learning_rate"),
    **_all("--model.training.weight_decay", "wd weight_decay"),
    **_all("--model.training.optimizer", "opt optim optimizer"),
    **_all("--model.training.warmup", "warmup warmup_epochs warmup_steps warmup_ratio"),
    **_all("--model.training.label_smoothing", "smoothing label_smoothing"),
    **_all("--trainer.max_epochs", "epochs num_epochs num_train_epochs max_epochs"),
    **_all("--trainer.max_steps", "steps max_steps max_iters iterations"),
    **_all("--trainer.devices", "gpus num_gpus devices nproc"),
    **_all("--trainer.accelerator", "device gpu cuda cpu accelerator"),
    **_all("--trainer.precision", "amp fp16 bf16 dtype precision"),
    **_all("--trainer.gradient_clip_val", "clip clip_grad grad_clip max_grad_norm"),
    **_all("--trainer.accumulate_grad_batches", "accumulate gradient_accumulation_steps grad_accum"),
    **_all("--data.batch_size", "bs batch batch_size per_device_train_batch_size"),
    **_all("--data.workers", "workers num_workers dataloader_num_workers"),
    **_all("--data.size", "img_size image_size input_size resolution size"),
    **_all("--data.vocab_size", "vocab vocab_size vocabulary"),
    **_all("--data.length", "block_size seq_len seq_length max_length max_seq_length context_length context length"),
    **_all("--data", "dataset data_dir data_path train_data root path folder"),
    **_all("--runs", "output out output_dir save_dir log_dir default_root_dir"),
    **_all("--name", "experiment run_name exp_name"),
    **_all("--seed_everything", "seed random_seed"),
    **_all("--init", "pretrained checkpoint ckpt weights finetune init_from load"),
}
