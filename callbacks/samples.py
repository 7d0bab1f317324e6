"""Greedy completions of a few validation prompts, as a table."""

import json
from pathlib import Path
from typing import Annotated

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import move_data_to_device, rank_zero_only

from callbacks.shared.run import data_of
from models.evaluation.answers import generate_texts
from models.generation.decoder import decoder_for
from models.loading.reference import end_token_ids
from models.student import StudentModule
from program.ranges import Between, Positive, check_arguments


class SampleCompletions(Callback):
    """After every validation, complete some validation prompts: a table in Weights & Biases, `samples.jsonl` in the run's folder.

    Args:
        num_samples: Prompts to complete; they are the first of the validation split, always the same.
        max_new_tokens: Length of a completion in tokens, at most.
    """

    needs_whole_student = True

    def __init__(self, num_samples: Positive = 8, max_new_tokens: Annotated[int, Between(1, 1e6)] = 64) -> None:
        check_arguments(SampleCompletions.__init__, locals(), "SampleCompletions.")
        self.num_samples = num_samples
        self.max_new_tokens = max_new_tokens

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check that there will be prompts to complete."""
        if stage == "fit":
            data_of(trainer)

    @rank_zero_only
    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Generate and log; sanity checks are left out."""
        if trainer.sanity_checking or trainer.state.fn != "fit":
            return
        assert isinstance(pl_module, StudentModule)
        batch = move_data_to_device(next(iter(data_of(trainer).val_dataloader())), pl_module.device)
        batch = {key: value[: self.num_samples] for key, value in batch.items()}
        decoder, ends = decoder_for(pl_module.student, pl_module.inference_dtype), end_token_ids(pl_module.student)
        texts = generate_texts(decoder, pl_module.tokenizer, batch, max_new_tokens=self.max_new_tokens, end_tokens=ends)
        rows = [
            {"step": trainer.global_step, "prompt": prompt, "completion": text, "answer": answer}
            for prompt, text, answer in zip(batch["prompts"], texts, batch["answers"], strict=True)
        ]
        with (Path(trainer.default_root_dir) / "samples.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.log_table("samples", columns=list(rows[0]), data=[list(row.values()) for row in rows])
