"""The peers of the quantization study, with their own presets and defaults.

| package           | preset                                  | weights                          | inputs                   |
|-------------------|-----------------------------------------|----------------------------------|--------------------------|
| `nvidia-modelopt` | `FP8_DEFAULT_CFG`                       | FP8, one scale                   | FP8, a calibrated scale  |
|                   | `FP8_PER_CHANNEL_PER_TOKEN_CFG`         | FP8, a scale a row               | FP8, a scale a token     |
|                   | `INT8_DEFAULT_CFG`                      | INT8, a scale a row              | INT8, a calibrated scale |
|                   | `INT8_SMOOTHQUANT_CFG`                  | the same, smoothed               | the same                 |
|                   | `INT4_BLOCKWISE_WEIGHT_ONLY_CFG`        | INT4, symmetric groups           | as they are              |
|                   | `INT4_AWQ_CFG`                          | the same, scaled by AWQ's search | as they are              |
| `torchao`         | `Int8DynamicActivationInt8WeightConfig` | INT8, a scale a row              | INT8, a scale a token    |
|                   | `Int8WeightOnlyConfig`                  | INT8, a scale a row              | as they are              |
|                   | `IntxWeightOnlyConfig`                  | INT4, symmetric groups           | as they are              |

All of them quantize the projections of the decoder layers, as we do, and leave embeddings, head and norms alone; groups have the size of
the format that they are compared with.  ModelOpt reads the calibration batches as they come, padding included, in bfloat16
autocast; torchao needs none.
"""

import contextlib
import copy
import io
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from typing import Any

import torch
from transformers import PreTrainedModel

from benchmarks.harness import MISSING
from datamodules.collate import Batch
from models.calibration.observe import on_device
from models.quantization.formats import format_of

_TITLES = {"nvidia-modelopt": "ModelOpt", "torchao": "torchao"}  # in lower case their modules


@dataclass(frozen=True)
class Peer:
    """A preset of another package."""

    format: str  # ours with the same grids
    package: str  # on PyPI: `nvidia-modelopt` or `torchao`
    preset: str
    algorithm: str = ""  # ModelOpt's calibration in the place of the preset's own

    @property
    def name(self) -> str:
        """For files and tables."""
        preset = self.preset.removesuffix("_CFG").removesuffix("Config")
        return f"{_TITLES[self.package]} {preset}" + (f" {self.algorithm}" if self.algorithm else "")

    def check_installed(self) -> None:
        """Raise `ModuleNotFoundError` unless its package is installed."""
        if find_spec(_TITLES[self.package].lower()) is None:
            raise ModuleNotFoundError(MISSING.format(self.package))

    def quantize(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        """Quantize a model in place."""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            if self.package == "torchao":
                self._quantize_by_torchao(model)
            else:
                self._quantize_by_modelopt(model, batches)

    def _quantize_by_torchao(self, model: PreTrainedModel) -> None:
        from torchao import quantization

        settings: dict[str, Any] = {}
        if group_size := format_of(self.format).weight.group_size:
            settings["weight_dtype"] = torch.int4  # type: ignore[attr-defined]
            settings["granularity"] = quantization.granularity.PerGroup(group_size)
        quantization.quantize_(model.base_model, getattr(quantization, self.preset)(**settings))

    def _quantize_by_modelopt(self, model: PreTrainedModel, batches: Sequence[Batch]) -> None:
        group_size = format_of(self.format).weight.group_size

        def read(_: Any) -> None:
            with torch.no_grad(), torch.autocast(model.device.type, torch.bfloat16):
                for batch in on_device(batches, model.device):
                    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
                    model.base_model(**inputs, use_cache=False)

        with contextlib.redirect_stdout(io.StringIO()):  # it reports every step
            from modelopt.torch import quantization

            config = copy.deepcopy(getattr(quantization, self.preset))
            for entry in config["quant_cfg"]:
                if group_size and "block_sizes" in entry.get("cfg", {}):
                    entry["cfg"]["block_sizes"][-1] = group_size
            if self.algorithm:
                config["algorithm"] = self.algorithm
            quantization.quantize(model.base_model, config, forward_loop=read)
