"""Quantization-aware training: find the scales, freeze them, then train with fake-quantized weights and activations."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from callbacks.pruning.gradual_pruning import GradualPruning
from callbacks.shared.averaging import refuse_averaging
from callbacks.shared.distributed import check_strategy, edit_on_all_ranks, rebuild_ddp_wrapper
from callbacks.shared.run import StepBoundary, check_order, data_of
from export.phases import Phases
from models.architecture import decoder_layers
from models.post_training.calibrate import calibrate_quantizers
from models.post_training.format_choice import formats_by_pattern, quantization_edits
from models.post_training.settings import Method, PostTrainingQuantization
from models.quantization import freeze_inputs, freeze_weights, merge_observations, quantized_linears
from models.quantization.cache import CacheFormat
from models.quantization.formats import FormatName
from models.quantization.learned_scales import check_can_follow, learned_scales
from models.quantization.scales import Search
from models.student import StudentModule
from program.ranges import Count, Positive, check_arguments


class QuantizationAwareTraining(Callback):
    """Fake-quantize the decoder's linear layers, and with them keys and values, from a given step on (embeddings and norms stay as
    they are, and so does the head unless exceptions name it).

    After `start_step` the layers observe their inputs for `observe_steps` steps; then all scales are frozen for good (those of
    inputs `inputs_after` steps later).  Or, with a `method`, the student is quantized after training batches at `start_step`, as
    `python -m export --calibration` does it, and training goes on from the best that calibration alone makes.  Scales belong to
    the student: a resumed run goes on with the same ones.  Several devices share what they observe.

    Args:
        start_step: Optimizer steps done before quantizers are inserted.
        observe_steps: Optimizer steps during which they only observe; 4 by default.
        format: Number format, see docs/recipes.md: fp8_e4m3 (one scale per weight and one per input) is what engines fuse.
        search: Range that scales cover: max (nothing seen is clipped), percentile (99.99 % of an input's values; it clips
            the few huge activations that decoders live on, so measure it), or mse (least squared error). By default max, and mse
            with a method.
        inputs_after: Optimizer steps with rounded weights before inputs are rounded as well; inputs are observed until then.
        exceptions: Formats of some layers by a pattern of their names, such as {"*.down_proj": int8_g64, "model.layers.0.*": none}; none
            leaves a layer as it is, and the last pattern that fits decides.  The output head, lm_head, is meant by its name only; it takes
            a weight-only format.
        kv_cache: Round keys and values as well, as a cache of this format holds them: fp8_e4m3 or int8; none leaves them as they are.
        method: Instead of observing, calibrate at start_step and round weights by nearest, gptq or quantease.
        calibration_batches: Training batches for that.
        seed: Of the choice of these batches.
        learn_scales: Train the scales of weights and calibrated inputs together with the weights, after they have been frozen (LSQ, arXiv
            1902.08153); a step changes a scale by about ten times the learning rate's share of it. Values that are clipped then pass
            no gradient. After gptq and quantease, weights are multiplied with their scales, so that their codes stay (PEQA,
            arXiv 2305.14152).

    Raises:
        ValueError: Steps out of range, a method together with steps of observation, quantization before the last pruning event,
            callbacks in the wrong order or one that averages weights, a strategy that shards the model, scales to learn where
            exceptions leave no layer to quantize or where weights that have to follow are not in float32, or a checkpoint with
            learned scales without learn_scales.
    """

    needs_whole_student = True

    def __init__(
        self,
        start_step: Positive,
        observe_steps: Positive | None = None,
        format: FormatName = "fp8_e4m3",
        search: Search | None = None,
        inputs_after: Count = 0,
        exceptions: Mapping[str, str] | None = None,
        kv_cache: CacheFormat | None = None,
        method: Method | None = None,
        calibration_batches: Positive = 16,
        seed: int = 0,
        learn_scales: bool = False,
    ) -> None:
        check_arguments(QuantizationAwareTraining.__init__, locals(), "QuantizationAwareTraining.")
        if method is not None and (observe_steps is not None or inputs_after):
            raise ValueError(
                f"expected either QuantizationAwareTraining.method or steps of observation, found {method}, observe_steps "
                f"{observe_steps} and inputs_after {inputs_after}; leave one of them out"
            )
        self.start_step = start_step
        self.freeze_weights_step = start_step + (0 if method is not None else observe_steps or 4)
        self.freeze_step = self.freeze_weights_step + inputs_after
        self.format = format
        self.search: Search = search or ("max" if method is None else "mse")
        self.exceptions = dict(exceptions or {})
        self.kv_cache = kv_cache
        self.method = method
        self.calibration_batches = calibration_batches
        self.seed = seed
        self.learn_scales = learn_scales
        self._weights_follow = method in ("gptq", "quantease")  # they leave weights on the grid
        self._boundary = StepBoundary()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Check the schedule against the other callbacks and the length of the run."""
        if stage != "fit":
            return
        check_order(trainer.callbacks)  # type: ignore[attr-defined]
        found = "both: averages of observed scales would mean nothing; leave one of them out"
        refuse_averaging(trainer.callbacks, "QuantizationAwareTraining without", found)  # type: ignore[attr-defined]
        check_strategy(trainer)
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, GradualPruning) and callback.last_step >= self.start_step:
                raise ValueError(
                    f"expected QuantizationAwareTraining.start_step after the last pruning event (step "
                    f"{callback.last_step}), found {self.start_step}; start later, so that the student recovers first"
                )

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check what needs the student, before the first step."""
        assert isinstance(pl_module, StudentModule)
        if self.learn_scales and not quantized_linears(pl_module.student):
            formats = formats_by_pattern(pl_module.student, self.format, self.exceptions)
            if not quantization_edits(formats):
                raise ValueError(
                    f"expected layers to quantize for QuantizationAwareTraining.learn_scales, found exceptions that leave all "
                    f"{len(formats)} as they are; change the exceptions, or set learn_scales to false"
                )
        if self.learn_scales and self._weights_follow:
            check_can_follow(pl_module.student.parameters())

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """What was done before a checkpoint was saved is in the checkpoint; scales that were frozen there can be learned from now on."""
        assert isinstance(pl_module, StudentModule)
        self._boundary.start(trainer.global_step)
        are_learned = bool(learned_scales(pl_module.student))
        if are_learned and not self.learn_scales:
            raise ValueError(
                "expected QuantizationAwareTraining.learn_scales for a checkpoint whose scales are learned already, found it false; "
                "set it to true"
            )
        if self.learn_scales and not are_learned and trainer.global_step >= self.freeze_step:
            self._learn_scales(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any, **kwargs: Any) -> None:
        """Insert or freeze the quantizers if it is time."""
        assert isinstance(pl_module, StudentModule)
        if self.start_step <= trainer.global_step <= self.freeze_step:
            # After every micro-batch: a DDP forward pass overwrites the other ranks' buffers with rank 0's, and a checkpoint
            # holds rank 0's alone.
            merge_observations(pl_module.student, lambda x, operation: trainer.strategy.reduce(x, reduce_op=operation))
        if not self._boundary.passed(trainer.global_step):
            return
        if trainer.global_step == self.start_step:
            formats = formats_by_pattern(pl_module.student, self.format, self.exceptions)
            edit_on_all_ranks(trainer, pl_module, quantization_edits(formats, self.kv_cache))
            if self.method is not None:
                self._calibrate(trainer, pl_module, self.method)
            else:
                layers = (
                    f"{len(quantized_linears(pl_module.student))} layers{' and the cache' if self.kv_cache else ''}"
                )
                rank_zero_info(f"Observing {layers} from step {self.start_step} on")
        stages = (("weights", self.freeze_weights_step, freeze_weights), ("inputs", self.freeze_step, freeze_inputs))
        for what, step, freeze in stages:
            if trainer.global_step == step and self.method is None:
                frozen = freeze(pl_module.student, self.search)
                rank_zero_info(f"Froze {frozen} {self.format} scales of {what} after step {step}")
        if self.learn_scales and trainer.global_step == self.freeze_step:
            self._learn_scales(trainer, pl_module)

    def _learn_scales(self, trainer: Trainer, module: StudentModule) -> None:
        edit_on_all_ranks(trainer, module, [{"op": "learn_scales", "weights_follow": self._weights_follow}])
        rank_zero_info(f"Learning {len(learned_scales(module.student))} scales from step {trainer.global_step} on")

    # Compiled code would be recompiled for every set of hooks, to read a few batches.
    @torch.compiler.set_stance("force_eager")
    def _calibrate(self, trainer: Trainer, module: StudentModule, method: Method) -> None:
        """Quantize the student after training batches, the same ones on every device; all end with rank 0's weights and scales."""
        batches = list(data_of(trainer).calibration_batches(self.calibration_batches, seed=self.seed))
        settings = PostTrainingQuantization(method=method, weight_search=self.search, input_search=self.search)
        what, layers = f"Quantizing after {len(batches)} batches", len(decoder_layers(module.student))
        with Phases().phase(what, layers) as on_layer:
            calibrate_quantizers(module.student, batches, settings, on_layer=lambda _: on_layer())
        rebuild_ddp_wrapper(trainer.strategy)
