"""One on-policy distillation step: this project's `Distillation` against TRL's `DistillationTrainer`, through both real trainers.

    python -m benchmarks.distillation_step [--batches 4 16] [--new-tokens 64] [--teacher REFERENCE] [--json FILE]

Each step samples one answer for every prompt of the batch from the student, asks the teacher, and takes one AdamW step on the
forward KL of the answer tokens.  Same prompts in the same order, student (every second layer of the teacher), float32 weights
under bfloat16 autocast, teacher in bfloat16, fused AdamW, clipping by norm 1, temperature 1, no gradient checkpointing, no logging.
No answer ends early: the student has no end token here, and TRL, which always takes the tokenizer's, is told `min_new_tokens`.
The first three steps of each side warm up.

Peak memory is the whole process's resident set on a CPU, torch's allocations on a GPU; ratios are this project over TRL.
"""

import json
import sys
import tempfile
from argparse import Namespace
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.utils.data import DataLoader

from benchmarks.harness import MISSING, parser, report, spread
from benchmarks.study import keep_layers
from benchmarks.workers import WARM_UP, Gate, Worker, take_turns
from datamodules.chat import Conversation, encode
from datamodules.collate import collate, pad_id_of
from models.loading.reference import load_model, load_tokenizer
from program.screen import as_command

TASKS: dict[str, dict[str, Any]] = {
    "gcd": {},
    "chain_sum": {},
    "simple_equations": {},
    "family_relationships": {"min_family_size": 4, "max_family_size": 4},
}
LEARNING_RATE = 1e-5
SIDES = {"potstill": "benchmarks.distillation_step:potstill", "trl": "benchmarks.distillation_step:trl"}


def main() -> None:
    """Measure both sides at each batch size."""
    options = parser(__doc__)
    options.add_argument("--batches", type=int, nargs="+", default=[4, 16], help="samples a step (default: 4 16)")
    options.add_argument("--new-tokens", type=int, default=64, help="tokens sampled for each prompt (default: 64)")
    options.add_argument("--teacher", default="package:smollm2-135m-instruct", help="model reference")
    options.add_argument("--student-layers", type=int, help="layers of the student (default: half of the teacher's)")
    arguments = options.parse_args()
    if find_spec("trl") is None:
        raise ModuleNotFoundError(MISSING.format("trl"))
    with tempfile.TemporaryDirectory() as folder:
        prepare(Path(folder), arguments.teacher, arguments.student_layers)
        results, ratios = [], {}
        for batch in arguments.batches:
            ours, theirs = rows = measure(Path(folder), batch, list(SIDES), arguments)
            results += rows
            for name, figure in (("tokens_per_second", "tokens_per_second"), ("peak_memory", "peak_memory_gb")):
                ratios[f"{name}_batch{batch}"] = ours[figure] / theirs[figure]
    report(results, ratios, ["torch", "lightning", "transformers", "trl"], arguments.json)


def prepare(folder: Path, teacher: str, student_layers: int | None) -> None:
    """Write `teacher` and `student` as Hugging Face folders: the student has evenly spread layers of the teacher."""
    model, tokenizer = load_model(teacher), load_tokenizer(teacher)
    model.save_pretrained(folder / "teacher")
    keep_layers(model, student_layers or model.config.num_hidden_layers // 2)
    model.config.eos_token_id = model.generation_config.eos_token_id = None
    model.save_pretrained(folder / "student")
    for name in ("teacher", "student"):
        tokenizer.save_pretrained(folder / name)


def measure(folder: Path, batch: int, sides: Sequence[str], arguments: Namespace) -> list[dict[str, Any]]:
    """One row for each side: steps in turns at one batch size."""
    from datamodules.reasoning import ReasoningTasks

    steps = WARM_UP + arguments.repetitions + 1  # the last waits at the gate when all is over
    tasks = ReasoningTasks(str(folder / "teacher"), TASKS, train_size=max(steps * batch, len(TASKS)), system_prompt="")
    system = {"role": "system", "content": ""}
    rows = [[system, *conversation.messages] for conversation in tasks.load_split("train")]
    (folder / "conversations.json").write_text(json.dumps(rows))
    settings = {"folder": str(folder), "batch": batch, "new_tokens": arguments.new_tokens, "steps": steps}
    workers = {name: Worker(SIDES[name], settings) for name in sides}
    results = []
    for name, measured in take_turns(workers, repetitions=arguments.repetitions).items():
        tokens = {row["tokens"] for row in measured}
        if tokens != {batch * arguments.new_tokens}:
            raise ValueError(
                f"expected {batch * arguments.new_tokens} completion tokens in every step of {name}, found "
                f"{sorted(tokens)}; no answer may end early, or the sides do different work"
            )
        row = {"name": name, "batch": batch, "new_tokens": arguments.new_tokens}
        row |= spread([step["seconds"] for step in measured])
        row["cpu_s"] = median(step["cpu_seconds"] for step in measured)
        row["tokens_per_second"] = batch * arguments.new_tokens / row["median_s"]
        row["peak_memory_gb"] = max(step["peak_bytes"] for step in measured) / 1e9
        results.append(row | {"threads": measured[0]["threads"]})
    return results


def potstill(gate: Gate, folder: str, batch: int, new_tokens: int, steps: int) -> None:
    """This project's side: `lightning.Trainer.fit` with `Distillation`, on-policy from the first step."""
    from lightning import Callback, LightningModule, Trainer

    from models import Distillation
    from models.generation.on_policy import OnPolicy

    class Turns(Callback):
        def on_train_batch_start(
            self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
        ) -> None:
            mean_tokens = trainer.callback_metrics.get("train/rollout_tokens", torch.zeros(()))
            gate.arrive(tokens=round(float(mean_tokens) * size), threads=torch.get_num_threads())

    size = batch
    tokenizer = load_tokenizer(f"{folder}/student")
    conversations = [Conversation(messages, "a benchmark") for messages in _conversations(folder)]
    loader: DataLoader = DataLoader(
        encode(tokenizer, conversations),  # type: ignore[arg-type]  # a list has all that a map-style data set needs
        batch_size=batch,
        collate_fn=partial(collate, pad_id=pad_id_of(tokenizer)),
    )
    module = Distillation(
        teacher=f"{folder}/teacher",
        student=f"{folder}/student",
        on_policy=OnPolicy(start=0, tokens=new_tokens),
        generate_tokens=0,
        lr_schedule="constant",
        optimizer=partial(torch.optim.AdamW, lr=LEARNING_RATE, weight_decay=0.0, fused=True),
    )
    Trainer(
        devices=1,
        max_steps=steps,
        precision="bf16-mixed",
        gradient_clip_val=1.0,
        callbacks=[Turns()],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(module, loader)


def trl(gate: Gate, folder: str, batch: int, new_tokens: int, steps: int) -> None:
    """TRL's side: `DistillationTrainer.train`, with the settings under which it was fastest."""
    from datasets import Dataset
    from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
    from trl import DistillationConfig, DistillationTrainer

    class Turns(TrainerCallback):
        seen = 0

        def on_step_begin(
            self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
        ) -> None:
            step = state.global_step - 1
            prompts = sum(lengths[step * batch : (step + 1) * batch]) if step >= 0 else 0
            tokens, self.seen = state.num_input_tokens_seen - self.seen - prompts, state.num_input_tokens_seen
            gate.arrive(tokens=tokens, threads=torch.get_num_threads())

    conversations = _conversations(folder)
    examples = encode(load_tokenizer(f"{folder}/student"), [Conversation(m, "a benchmark") for m in conversations])
    lengths = [example.prompt_length for example in examples]
    config = DistillationConfig(
        output_dir=f"{folder}/trl",
        per_device_train_batch_size=batch,
        max_steps=steps,
        max_completion_length=new_tokens,
        generation_kwargs={"min_new_tokens": new_tokens},
        beta=0.0,  # forward KL
        temperature=1.0,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        max_grad_norm=1.0,
        optim="adamw_torch_fused",
        bf16=True,
        use_cpu=not torch.cuda.is_available(),
        model_init_kwargs={"dtype": "float32"},
        teacher_model_init_kwargs={"dtype": "bfloat16"},
        gradient_checkpointing=False,
        shuffle_dataset=False,
        dataloader_num_workers=0,
        dataloader_pin_memory=torch.cuda.is_available(),
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )
    DistillationTrainer(
        model=f"{folder}/student",
        teacher_model=f"{folder}/teacher",
        args=config,
        train_dataset=Dataset.from_list([{"prompt": messages[:-1]} for messages in conversations]),
        callbacks=[Turns()],
    ).train()


def _conversations(folder: str) -> list[list[dict[str, str]]]:
    conversations: list[list[dict[str, str]]] = json.loads(Path(folder, "conversations.json").read_text())
    return conversations


if __name__ == "__main__":
    sys.exit(as_command(main)())
