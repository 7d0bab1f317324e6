"""Sampling answers: `models.generation.rollout.rollout` against `transformers`' own `generate`, same weights, prompts and lengths.

    python -m benchmarks.rollout [--model REFERENCE] [--json FILE]

Both sample in bfloat16 with a key/value cache, without end tokens, so that both generate exactly the same number of tokens.
"""

import sys
from functools import partial
from typing import Any

import torch

from benchmarks.harness import interleave, parser, report, spread
from models.copies import inference_copy
from models.generation.decoder import decoder_for
from models.generation.rollout import rollout
from models.generation.sampling import Sampling
from models.loading.reference import load_model
from program.screen import as_command

PROMPT_TOKENS = 32


def main() -> None:
    """Measure batches of 4 and 16 samples of 64 new tokens."""
    options = parser(__doc__)
    options.add_argument("--model", default="package:smollm2-135m-instruct", help="model reference")
    options.add_argument("--new-tokens", type=int, default=64, help="tokens sampled for each prompt (default: 64)")
    arguments = options.parse_args()
    new = arguments.new_tokens
    model = inference_copy(load_model(arguments.model), torch.bfloat16)
    decoder = decoder_for(model, torch.bfloat16)
    results, ratios = [], {}
    for batch in (4, 16):
        prompts_BP = torch.randint(100, model.config.vocab_size, (batch, PROMPT_TOKENS))
        mask_BP = torch.ones_like(prompts_BP)
        ours = partial(rollout, decoder, prompts_BP, mask_BP, end_tokens=[], sampling=Sampling(), seeds=range(batch))
        generate: Any = model.generate  # transformers adds it where type checkers do not look
        theirs = partial(generate, prompts_BP, attention_mask=mask_BP, min_new_tokens=new, do_sample=True, top_k=0)
        sides = {"potstill": ours, "transformers": theirs}
        timed = {name: partial(side, max_new_tokens=new) for name, side in sides.items()}
        seconds = interleave(timed, repetitions=arguments.repetitions)
        for name, times in seconds.items():
            row = {"name": name, "batch": batch, "new_tokens": new, **spread(times)}
            results.append(row | {"tokens_per_second": batch * new / row["median_s"]})
        ratios[f"tokens_per_second_batch{batch}"] = results[-2]["tokens_per_second"] / results[-1]["tokens_per_second"]
    report(results, ratios, ["torch", "transformers"], arguments.json)


if __name__ == "__main__":
    sys.exit(as_command(main)())
