"""`python train.py plan`: what a recipe will need on given GPUs, from its models' configurations alone; no weight is loaded.

Memory is counted by running the step without data (`models.planning.memory`); hours are FLOPs at a stated utilisation, and bytes at the
GPU's bandwidth where a rollout reads weights for every token.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import nn
from transformers import PretrainedConfig

from models.distillation import Distillation
from models.loading.reference import load_model_config
from models.losses import Objective
from models.planning import scaling
from models.planning.memory import (
    HEAP,
    Sizes,
    StepSettings,
    evaluation_bytes,
    event_bytes,
    rollout_bytes,
    sizes_of,
    state_bytes,
    step_bytes,
)
from models.pruning.scores.curvature import FISHER_EVERY
from models.student import StudentModule

GB = 1e9
USABLE = 0.92  # of a GPU's memory: the rest is CUDA's own and what its allocator cannot use
READ_SHARE = 0.6  # of the bandwidth that decoding reaches


@dataclass(frozen=True)
class Gpu:
    """A GPU by its data sheet: memory in GB, dense bfloat16 TFLOP/s, memory bandwidth in TB/s, watts."""

    memory: float
    tflops: float
    bandwidth: float
    watts: float


#: NVIDIA's data sheets; the SXM form where there are two.
GPUS: dict[str, Gpu] = {
    "rtx4090": Gpu(24, 165, 1.0, 450),
    "l40s": Gpu(48, 362, 0.86, 350),
    "a100-40": Gpu(40, 312, 1.56, 400),
    "a100": Gpu(80, 312, 2.04, 400),
    "h100": Gpu(80, 989, 3.35, 700),
    "h200": Gpu(141, 989, 4.8, 700),
    "b200": Gpu(180, 2250, 7.7, 1000),
}
GpuName = Literal["rtx4090", "l40s", "a100-40", "a100", "h100", "h200", "b200"]
#: What each overlay of configs/ changes of a step.
OVERLAYS: dict[str, dict[str, Any]] = {
    "checkpointing": {"checkpointing": True},
    "adam8bit": {"optimizer": "AdamW8bit"},
    "bf16_weights": {"student_dtype": "bfloat16", "optimizer": "AdamW8bit"},
    "lora": {"lora_rank": 16},
    "teacher_int8": {"teacher_dtype": "int8"},
}
_CROSS_ENTROPY = Objective({"cross_entropy": 1.0})
#: Overlays to try, in rising order of what they cost: time, then exactness, then what is trained.
LADDER: tuple[tuple[str, ...], ...] = (
    (),
    ("checkpointing",),
    ("adam8bit",),
    ("checkpointing", "adam8bit"),
    ("checkpointing", "bf16_weights"),
    ("checkpointing", "teacher_int8"),
    ("checkpointing", "bf16_weights", "teacher_int8"),
    ("checkpointing", "lora"),
    ("checkpointing", "lora", "teacher_int8"),
)


@dataclass(frozen=True)
class Machine:
    """Where a run takes place.

    Attributes:
        gpus: How many.
        gpu: Which.
        sharded: Weights, gradients and moments are spread over them (configs/fsdp.yaml).
        utilisation: Share of the GPU's FLOP/s that training reaches.
    """

    gpus: int
    gpu: Gpu
    sharded: bool
    utilisation: float


@dataclass(frozen=True)
class Workload:
    """What a recipe does, as far as it decides about memory and time.

    Attributes:
        student: Configuration of the student.
        teacher: That of a live teacher; None for none.
        step: Of a micro-batch.
        steps: Optimizer steps.
        accumulate: Micro-batches of one.
        mean_length: Tokens of a sample, on average.
        own_share: Share of steps on the student's own answers.
        own_tokens: Their length.
        events: Pruning events.
        calibration_batches: Of each.
    """

    student: PretrainedConfig
    teacher: PretrainedConfig | None
    step: StepSettings
    steps: int
    accumulate: int
    mean_length: float
    own_share: float = 0.0
    own_tokens: int = 0
    events: int = 0
    calibration_batches: int = 0


def workload_of(
    module: StudentModule,
    data: Any,
    trainer: Any,
    *,
    length: int,
    mean_length: float,
    answer_share: float,
    device: str = "cuda",
) -> Workload:
    """What the parts of a recipe say; nothing is loaded but configurations."""
    own = module.own_answers if isinstance(module, Distillation) else None
    reference = getattr(module, "teacher_reference", None)
    callbacks = {type(callback).__name__: callback for callback in trainer.callbacks}
    pruning, lora = callbacks.get("GradualPruning"), callbacks.get("LoRA")
    mixed = str(trainer.precision).startswith("bf16")
    teacher_dtype = getattr(module, "teacher_dtype", "auto")
    objectives = getattr(module, "objectives", None)
    step = StepSettings(
        batch_size=data.batch_size,
        length=length,
        answer_share=answer_share,
        mixed=mixed,
        student_dtype=module.student_dtype,
        teacher_dtype=("bfloat16" if mixed else "float32") if teacher_dtype == "auto" else teacher_dtype,
        optimizer=type(module.optimizer([nn.Parameter(torch.zeros(1))])).__name__,
        checkpointing=module.gradient_checkpointing,
        lora_rank=lora.settings["rank"] if lora else 0,
        chunk_tokens=module.chunk_tokens,
        device=device,
        **({"objective": objectives["dataset"]} if objectives else {"objective": _CROSS_ENTROPY}),
    )
    steps = max(trainer.max_steps, 0)
    return Workload(
        student=load_model_config(module.student_reference),
        teacher=load_model_config(reference) if reference and not reference.startswith("offline:") else None,
        step=step,
        steps=steps,
        accumulate=trainer.accumulate_grad_batches,
        mean_length=mean_length,
        own_share=sum(own.probability(number) for number in range(steps)) / steps if own and steps else 0.0,
        own_tokens=own.settings.tokens if own else 0,
        events=len(pruning.steps) if pruning else 0,
        calibration_batches=pruning.calibration_batches if pruning else 0,
    )


def memory(work: Workload, machine: Machine) -> dict[str, Any]:
    """Bytes per GPU: parts of a step, and the most at each moment of the run."""
    parts = step_bytes(work.student, work.teacher, work.step)
    ours, theirs = sizes_of(work.student, work.step.lora_rank), sizes_of(work.teacher) if work.teacher else None
    state = ("weights", "teacher", "moments", "gradients")
    step, kept = parts["peak"], sum(parts[name] for name in state[:3])
    if machine.sharded and machine.gpus > 1:
        parts |= {name: parts[name] // machine.gpus for name in state}
        parts["gathered"] = _gathered(ours, 4) + (_gathered(theirs, 2) if theirs else 0)
        kept = sum(parts[name] for name in state[:3])
        step = kept + parts["gathered"] + max(parts["activations"] + parts["logits"], 2 * parts["gradients"])
    inference = torch.bfloat16 if work.step.mixed else torch.float32
    rows = work.step.batch_size * work.accumulate
    moments = {"training step": step, "evaluation": kept + evaluation_bytes(ours)}
    if work.own_share:
        moments["rollout"] = kept + rollout_bytes(ours, rows, work.step.length, inference)
    if work.events:
        passing = HEAP.get(work.step.device, 1.0) * parts["activations"]
        moments["pruning event"] = kept + round(passing) + event_bytes(ours)
    return {
        "parts": parts,
        "moments": moments,
        "peak": max(moments.values()),
        "usable": USABLE * machine.gpu.memory * GB,
    }


def _gathered(sizes: Sizes, itemsize: int) -> int:
    """FSDP2's whole copies: two layers (one computes, the next comes in), and embedding and head."""
    return itemsize * (2 * sizes.largest_layer + sizes.head * (1 if sizes.tied else 2))


def what_fits(work: Workload, machine: Machine) -> tuple[list[str], dict[str, Any]] | None:
    """The first overlays of `LADDER` with which the recipe fits, and its memory then; None if nothing helps."""
    may_shard = machine.gpus > 1 and not machine.sharded and not work.events
    for overlays in LADDER:
        if "teacher_int8" in overlays and not work.teacher:
            continue
        changed = {name: value for overlay in overlays for name, value in OVERLAYS[overlay].items()}
        for further in ([], ["fsdp"]) if may_shard and "teacher_int8" not in overlays else ([],):
            there, then = (
                replace(machine, sharded=machine.sharded or bool(further)),
                replace(work, step=replace(work.step, **changed)),
            )
            if _least(then, there) > USABLE * machine.gpu.memory * GB:
                continue
            found = memory(then, there)
            if found["peak"] <= found["usable"]:
                return [*overlays, *further], found
    return None


def _least(work: Workload, machine: Machine) -> float:
    """Bytes of weights, teacher and moments alone: where these do not fit, no step has to be counted."""
    ours, theirs = sizes_of(work.student, work.step.lora_rank), sizes_of(work.teacher) if work.teacher else None
    state = state_bytes(ours, theirs, work.step)
    return (sum(state.values()) - state["gradients"]) / (machine.gpus if machine.sharded else 1)


def phases(work: Workload, machine: Machine) -> list[dict[str, Any]]:
    """FLOPs of all GPUs and hours, by phase: dataset steps, own answers (sampling, and learning from them), pruning events."""
    ours, theirs = sizes_of(work.student, work.step.lora_rank), sizes_of(work.teacher) if work.teacher else None
    samples = work.step.batch_size * work.accumulate * machine.gpus
    answers = work.step.answer_share * work.mean_length
    backward = (3 if not work.step.lora_rank else 2) + work.step.checkpointing
    learn = samples * (
        backward * _forward_flops(ours, work.mean_length, answers)
        + (_forward_flops(theirs, work.mean_length, answers) if theirs else 0)
    )
    peak = machine.gpus * machine.gpu.tflops * 1e12 * machine.utilisation
    rows: list[dict[str, Any]] = [{"phase": "answers of the data", "flops": work.steps * (1 - work.own_share) * learn}]
    if work.own_share:
        own = work.steps * work.own_share
        rows.append({"phase": "own answers: learning", "flops": own * learn})
        prompt = work.mean_length - answers
        sampled = samples * (_forward_flops(ours, prompt, 1) + work.own_tokens * 2 * ours.parameters)
        itemsize = 2 if work.step.mixed else 4
        per_gpu = work.step.batch_size * work.accumulate
        read = itemsize * (ours.parameters + per_gpu * (prompt + work.own_tokens / 2) * ours.cached)
        reading = work.own_tokens * read / (machine.gpu.bandwidth * 1e12 * READ_SHARE)
        rows.append(
            {
                "phase": "own answers: sampling",
                "flops": own * sampled,
                "hours": own * max(reading, sampled / peak) / 3600,
            }
        )
    if work.events:
        passes = work.events * work.calibration_batches * (4 + 2 / FISHER_EVERY)
        rows.append(
            {"phase": "pruning events", "flops": passes * samples * _forward_flops(ours, work.mean_length, answers)}
        )
    return [{"hours": row["flops"] / peak / 3600, **row} for row in rows]


def _forward_flops(sizes: Sizes, tokens: float, with_logits: float) -> float:
    """Of one sample: products with weights, causal attention, and logits where they are wanted."""
    body = sizes.parameters - sizes.head * (1 if sizes.tied else 2)
    return 2 * body * tokens + 2 * sizes.attended * tokens**2 + 2 * sizes.head * with_logits


def costs(rows: list[dict[str, Any]], machine: Machine, price: float | None) -> dict[str, float]:
    """Totals: hours, GPU hours, kilowatt-hours at the GPUs' full power, and money if an hour of a GPU has a price."""
    hours = sum(row["hours"] for row in rows)
    found = {"hours": hours, "gpu_hours": hours * machine.gpus, "kwh": hours * machine.gpus * machine.gpu.watts / 1000}
    return found | ({"money": hours * machine.gpus * price} if price is not None else {})


def guidance(gpu_hours: float, work: Workload, machine: Machine) -> dict[str, Any]:
    """How to spend so many GPU hours, by `models.planning.scaling`."""
    flops = gpu_hours * 3600 * machine.gpu.tflops * 1e12 * machine.utilisation
    ways = scaling.ways_to_spend(flops, sizes_of(work.teacher).parameters if work.teacher else 0.0)
    laws = [law.source for law in scaling.LAWS]
    return {"flops": flops, "laws": laws, "best": scaling.as_rows(scaling.best(ways)), "ways": scaling.as_rows(ways)}


def in_words(plan: Mapping[str, Any]) -> str:
    """The plan as people read it."""
    found, machine = plan["memory"], plan["machine"]
    lines = [f"Memory of one GPU, of {machine['gpu']['memory']:g} GB ({found['usable'] / GB:.0f} GB usable)", ""]
    lines += [f"  {name:<24}{size / GB:10.1f} GB" for name, size in found["parts"].items() if name != "peak"]
    lines += ["", "The most at any moment (parts are not all there at once)", ""]
    lines += [f"  {name:<24}{size / GB:10.1f} GB" for name, size in found["moments"].items()]
    lines += [
        "",
        _verdict(plan),
        "",
        f"Time at {machine['utilisation']:.0%} of {machine['gpu']['tflops']:g} TFLOP/s",
        "",
    ]
    lines += [f"  {row['phase']:<24}{row['flops']:12.2e} FLOPs {row['hours']:10.3g} h" for row in plan["phases"]]
    total = plan["costs"]
    money = f", {total['money']:,.2f} in money" if "money" in total else ""
    lines += [
        "",
        f"  {total['hours']:.3g} hours, {total['gpu_hours']:.3g} GPU hours, {total['kwh']:.3g} kWh at full power{money}",
    ]
    if advice := plan.get("guidance"):
        lines += [
            "",
            f"What {advice['flops']:.2e} FLOPs pay for, and nats a token by each law (of pre-training: tokens are an upper bound)",
            "",
        ]
        lines += [f"  [{number}] {law}" for number, law in enumerate(advice["laws"], 1)]
        bests = [way["parameters"] for way in advice["best"]]
        for way in advice["ways"][:: max(1, len(advice["ways"]) // 8)] + advice["best"]:
            stars = "".join(f" best by [{number}]" for number, size in enumerate(bests, 1) if size == way["parameters"])
            losses = "  ".join(f"{loss:.3f}" for loss in way["losses"])
            lines.append(
                f"  {way['parameters'] / 1e9:8.3f} B parameters {way['tokens'] / 1e9:10.2f} B tokens   {losses}{stars}"
            )
    return "\n".join(lines)


def _verdict(plan: Mapping[str, Any]) -> str:
    fitting = plan["fits_with"]
    if fitting is None:
        return "It does not fit, with no overlay of configs/; take more GPUs, a smaller batch, a shorter max_length or a smaller model."
    if not fitting:
        return "It fits."
    added = " ".join(f"--config configs/{name}.yaml" for name in fitting)
    return f"It does not fit; with {added} it does ({plan['memory_then']['peak'] / GB:.1f} GB)."
