"""Base class of chat data modules: tokenizing (once, in `setup`), loaders that resume exactly, calibration batches."""

from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property, partial
from typing import Annotated

import torch
from lightning import LightningDataModule
from lightning.pytorch.utilities import rank_zero_info
from torchdata.stateful_dataloader import StatefulDataLoader
from transformers import PreTrainedTokenizerBase

from datamodules.chat import Conversation, Example, check_tokenizer, encode, truncate
from datamodules.collate import Batch, collate, pad_id_of
from datamodules.loader import ResumableLoader
from datamodules.sampler import LengthBucketSampler
from program.ranges import Between, Positive, check_arguments

SPLITS_OF_STAGE = {"fit": ("train", "val"), "validate": ("val",), "test": ("test",), "predict": ("test",)}


class ChatDataModule(LightningDataModule):
    """Chat data for training, validation, test and prediction; subclasses provide the conversations.

    Args:
        tokenizer: Model reference whose tokenizer and chat template are used; the command line sets it to the student.
        batch_size: Training samples per micro-batch and device.
        eval_batch_size: Samples per batch and device in validation, test and prediction.
        max_length: Tokens of prompt and answer together; longer answers lose their tail.
        max_prompt_length: Tokens of the prompt; longer ones drop the sample (null: only `max_length` counts).
        system_prompt: System message for conversations without one (null: whatever the chat template does by default).
        supervise_all_turns: Learn from every assistant turn of a conversation instead of the last one only.
        length_bucketing: Put training samples of similar length into the same batch, which saves padding.
        num_workers: Processes that load training batches; 0 pads in the main process, which is usually enough.
        seed: Decides the order of training samples and whatever else the data draws at random.
        trust_remote_code: Run Python code that comes with the tokenizer.
    """

    def __init__(
        self,
        tokenizer: str,
        *,
        batch_size: Positive = 8,
        eval_batch_size: Positive = 32,
        max_length: Positive = 512,
        max_prompt_length: Positive | None = None,
        system_prompt: str | None = None,
        supervise_all_turns: bool = True,
        length_bucketing: bool = True,
        num_workers: Annotated[int, Between(0, 1024)] = 0,
        seed: int = 0,
        trust_remote_code: bool = False,
    ) -> None:
        super().__init__()
        check_arguments(ChatDataModule.__init__, locals(), "data.")
        # Not to the logger: a module's hyperparameter of the same name (a seed, say) would clash with ours there.
        self.save_hyperparameters(logger=False)
        self.tokenizer_reference = tokenizer
        self.batch_size = batch_size
        self.eval_batch_size = eval_batch_size
        self.max_length = max_length
        self.max_prompt_length = max_prompt_length
        self.system_prompt = system_prompt
        self.supervise_all_turns = supervise_all_turns
        self.length_bucketing = length_bucketing
        self.num_workers = num_workers
        self.seed = seed
        self.trust_remote_code = trust_remote_code
        #: For every split that was set up: samples whose answer was "cut", samples "dropped", and the "total".
        self.truncation: dict[str, dict[str, int]] = {}
        self._conversations: dict[str, list[Conversation]] = {}
        self._examples: dict[str, list[Example]] = {}

    # What a subclass provides

    def load_split(self, split: str) -> list[Conversation]:
        """The conversations of a split, in a fixed order."""
        raise NotImplementedError

    def has_split(self, split: str) -> bool:
        """Whether the split was configured."""
        return True

    def tokenize(self, conversations: list[Conversation]) -> list[Example]:
        """One example for each conversation, of any length."""
        every = self.supervise_all_turns
        return encode(self.tokenizer, conversations, system_prompt=self.system_prompt, supervise_all_turns=every)

    @property
    def collate_fn(self) -> Callable[[Sequence[Example]], Batch]:
        """Makes a batch of examples; loader workers get a copy of it."""
        return partial(collate, pad_id=pad_id_of(self.tokenizer))

    @property
    def has_score(self) -> bool:
        """Whether `score` gives numbers; where it does not, nobody generates answers for it."""
        return False

    def score(self, predictions: list[str], batch: Batch, split: str) -> list[float] | None:
        """Task score in 0..1 of each row's completion, for a batch of the split's loader; `None` where none is."""
        return None

    def constant_answer_score(self, split: str) -> float | None:
        """The score of always giving the most common answer; `None` where the data has no score."""
        return None

    # Data

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer behind the reference; its chat template and end token were checked."""
        from models.loading.reference import load_tokenizer  # only here: `models` imports this package

        tokenizer = load_tokenizer(self.tokenizer_reference, trust_remote_code=self.trust_remote_code)
        check_tokenizer(tokenizer, self.tokenizer_reference)
        return tokenizer

    def setup(self, stage: str) -> None:
        """Load and tokenize the splits of a stage: fit, validate, test or predict."""
        for split in SPLITS_OF_STAGE[stage]:
            if stage != "fit" or split == "train" or self.has_split(split):
                self.examples(split)

    def conversations(self, split: str) -> list[Conversation]:
        """The split before tokenizing; `Batch["index"]` counts in this list."""
        if split not in self._conversations:
            self._conversations[split] = self.load_split(split)
        return self._conversations[split]

    def examples(self, split: str) -> list[Example]:
        """The split's tokenized samples that fit into `max_length`."""
        if split not in self._examples:
            self._examples[split] = self._encode(split)
        return self._examples[split]

    def _encode(self, split: str) -> list[Example]:
        encoded = self.tokenize(self.conversations(split))
        fitting = [truncate(e, max_length=self.max_length, max_prompt_length=self.max_prompt_length) for e in encoded]
        kept = [example for example in fitting if example is not None]
        num_dropped = len(encoded) - len(kept)
        num_cut = len(kept) - sum(after is before for before, after in zip(encoded, fitting, strict=True))
        self.truncation[split] = {"cut": num_cut, "dropped": num_dropped, "total": len(encoded)}
        limits = f"max_length {self.max_length}, max_prompt_length {self.max_prompt_length}"
        if not kept:
            shortest = min((example.prompt_length for example in encoded), default=0)
            raise ValueError(
                f"expected {split} samples that fit into {limits} (tokens), found none among {len(encoded)}, of which "
                f"the shortest prompt has {shortest} tokens; raise the limits or provide shorter samples"
            )
        if num_cut or num_dropped:
            rank_zero_info(
                f"{split}: of {len(encoded)} samples, {num_cut} lost the end of their answer and {num_dropped} were "
                f"dropped because of their prompt ({limits})"
            )
        return kept

    # Loaders

    def train_dataloader(self) -> StatefulDataLoader:
        """Training batches in an order that depends on the seed and the epoch alone."""
        examples = self.examples("train")
        sampler = LengthBucketSampler(
            [len(example) for example in examples],
            self.batch_size,
            pool_batches=16 if self.length_bucketing else 1,
            seed=self.seed,
            num_replicas=self.trainer.world_size if self.trainer else 1,
            rank=self.trainer.global_rank if self.trainer else 0,
        )
        if self.trainer:
            # Worker processes fetch before Lightning tells the sampler the epoch of a resumed run.
            sampler.set_epoch(self.trainer.fit_loop.epoch_progress.current.processed)  # type: ignore[attr-defined]
        return self._loader(examples, self.batch_size, sampler)

    def val_dataloader(self) -> StatefulDataLoader | list[StatefulDataLoader]:
        """Validation batches, shortest samples first; no loader where no validation data was configured."""
        return self._eval_loader("val") if self.has_split("val") else []

    def test_dataloader(self) -> StatefulDataLoader:
        """Test batches, shortest samples first; also the prompts of `predict`."""
        return self._eval_loader("test")

    predict_dataloader = test_dataloader

    def calibration_batches(self, num_batches: int, seed: int) -> Iterator[Batch]:
        """Training batches drawn by `seed`, apart from any loader's state; samples repeat only when all were used."""
        examples = self.examples("train")
        generator = torch.Generator().manual_seed(seed)
        drawn: list[int] = []
        for _ in range(num_batches):
            while len(drawn) < self.batch_size:
                drawn += torch.randperm(len(examples), generator=generator).tolist()
            yield self.collate_fn([examples[i] for i in drawn[: self.batch_size]])
            drawn = drawn[self.batch_size :]

    def _eval_loader(self, split: str) -> StatefulDataLoader:
        # Sorted as data, not by a sampler: under DDP Lightning can then put its own sampler in place.
        return self._loader(sorted(self.examples(split), key=len), self.eval_batch_size)

    def _loader(
        self, examples: list[Example], batch_size: int, sampler: LengthBucketSampler | None = None
    ) -> StatefulDataLoader:
        return ResumableLoader(
            examples,  # type: ignore[arg-type]  # a list has all that a map-style dataset needs
            batch_size=batch_size,
            sampler=sampler,
            num_workers=self.num_workers if sampler else 0,
            accumulate=(lambda: self.trainer.accumulate_grad_batches if self.trainer else 1) if sampler else None,
            limit=lambda: self.trainer.num_training_batches if self.trainer else float("inf"),
            collate_fn=self.collate_fn,
            pin_memory=torch.cuda.is_available(),
        )


def exact_match(predictions: Sequence[str], answers: Sequence[str]) -> list[float]:
    """1.0 where a prediction equals the answer, without the white space around both."""
    return [float(p.strip() == a.strip()) for p, a in zip(predictions, answers, strict=True)]


def most_common_share(answers: Sequence[str]) -> float:
    """The exact-match score of always giving the most common answer."""
    return max(Counter(answer.strip() for answer in answers).values()) / len(answers)
