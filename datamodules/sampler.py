"""The order of training samples: shuffled, in batches of similar length, and exactly resumable.

Sorting the whole dataset would show the same neighbours in every epoch, so `LengthBucketSampler` shuffles, sorts by
length inside pools of a few batches, and shuffles the batches. It yields single indices, which an ordinary loader with
the same `batch_size` cuts into these batches.

It extends `torch.utils.data.DistributedSampler` so that Lightning does not wrap it in another one. Unlike there, all
ranks get a share of the same bucket, so no rank waits for a longer batch, and the iterator has a state, from which
torchdata's loader restores epoch and position: Lightning tells a resumed sampler the epoch only later.
"""

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch.utils.data import DistributedSampler


class LengthBucketSampler(DistributedSampler):
    """Yield indices so that runs of `batch_size` have similar lengths (tokens); a function of seed and epoch alone.

    `batch_size` counts samples of one rank; `pool_batches` of all ranks are sorted together, 1 is a plain shuffle.
    """

    def __init__(
        self,
        lengths: Sequence[int],
        batch_size: int,
        *,
        pool_batches: int = 16,
        seed: int = 0,
        num_replicas: int = 1,
        rank: int = 0,
    ) -> None:
        super().__init__(range(len(lengths)), num_replicas=num_replicas, rank=rank, seed=seed)  # type: ignore[arg-type]
        self.lengths = lengths
        self.batch_size = batch_size
        self.pool_batches = pool_batches

    def __iter__(self) -> "_ResumableIndices":
        return _ResumableIndices(self)

    def fingerprint(self) -> dict[str, int]:
        """What the order depends on, beside the epoch."""
        data = {"samples": len(self.lengths), "tokens": sum(self.lengths), "batch_size": self.batch_size}
        return {**data, "pool_batches": self.pool_batches, "seed": self.seed, "processes": self.num_replicas}

    def order(self, epoch: int) -> list[int]:
        """This rank's indices in an epoch; a short last batch is random, not what is longest in a sorted pool."""
        # `seed + epoch` would make epoch 1 of seed 0 the same as epoch 0 of seed 1.
        generator = torch.Generator().manual_seed((self.seed * 1_000_003 + epoch) % 2**63)
        shuffled = torch.randperm(len(self.lengths), generator=generator).tolist()
        global_batch = self.batch_size * self.num_replicas
        num_full = len(shuffled) // global_batch * global_batch
        full, rest = shuffled[:num_full], shuffled[num_full:]

        batches: list[list[int]] = []
        pool_size = global_batch * self.pool_batches
        for start in range(0, num_full, pool_size):
            pool = full[start : start + pool_size]
            if self.pool_batches > 1:
                pool.sort(key=lambda i: self.lengths[i])
            batches += [pool[i : i + global_batch] for i in range(0, len(pool), global_batch)]
        mixed = [batches[i] for i in torch.randperm(len(batches), generator=generator).tolist()]

        # Every rank needs as many samples as the others: repeat some if the last batch can't be shared out evenly.
        missing = -len(rest) % self.num_replicas
        repeats = -(-missing // len(shuffled))
        rest += (shuffled * repeats)[:missing]
        return [i for batch in [*mixed, rest] for i in batch[self.rank :: self.num_replicas]]


class _ResumableIndices(Iterator[int]):
    """One pass over the sampler; the order is fixed at the first index.

    An epoch that is set before, even after a state was loaded, starts from its beginning: so does a run that was saved
    after the last batch of `limit_train_batches`.
    """

    def __init__(self, sampler: LengthBucketSampler) -> None:
        self.sampler = sampler
        self.epoch = sampler.epoch
        self.yielded = 0
        self.order: list[int] | None = None

    def __next__(self) -> int:
        self._follow_sampler()
        if self.order is None:
            self.order = self.sampler.order(self.epoch)
        if self.yielded >= len(self.order):
            raise StopIteration
        self.yielded += 1
        return self.order[self.yielded - 1]

    def state_dict(self) -> dict[str, Any]:
        self._follow_sampler()
        return {"epoch": self.epoch, "yielded": self.yielded, "data": self.sampler.fingerprint()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if state_dict["data"] != self.sampler.fingerprint():
            rank_zero_warn(
                f"The checkpoint was saved in the middle of an epoch over {state_dict['data']}, and the data is now "
                f"{self.sampler.fingerprint()}: the rest of this epoch repeats some samples and skips others."
            )
        self.epoch, self.yielded = state_dict["epoch"], state_dict["yielded"]
        if self.yielded >= len(self.sampler):
            # Saved between the last batch and the end of the epoch: a loader that is empty would make Lightning skip
            # the whole next epoch.
            self.epoch, self.yielded = self.epoch + 1, 0
        self.sampler.set_epoch(self.epoch)
        self.order = None

    def _follow_sampler(self) -> None:
        if self.order is None and self.epoch != self.sampler.epoch:
            self.epoch, self.yielded = self.sampler.epoch, 0
