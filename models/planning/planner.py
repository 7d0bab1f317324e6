"""The trainer behind `python train.py`: Lightning's, and `plan`, which trains nothing."""

import json
from pathlib import Path
from typing import Annotated, Any

import matplotlib.pyplot as plt
from lightning import LightningDataModule, LightningModule, Trainer

from models.planning import plan as planning
from models.planning.plan import GPUS, GpuName, Machine
from models.planning.scaling import LAWS
from models.student import StudentModule
from program.files import write_file
from program.ranges import Between, Count, Positive, Share, check_arguments

_PARTS = ("weights", "teacher", "moments", "gradients", "activations", "logits", "gathered")


class Planner(Trainer):
    """Lightning's trainer, which can also say what a run would need."""

    def plan(
        self,
        model: LightningModule,
        datamodule: LightningDataModule | None = None,
        gpus: Positive = 1,
        gpu: GpuName = "h100",
        utilisation: Annotated[float, Between(0, 1, (0,))] = 0.35,
        length: Count = 0,
        mean_length: Annotated[float, Between(0)] = 0.0,
        answer_share: Share = 0.5,
        sharded: bool | None = None,
        price: Annotated[float, Between(0)] | None = None,
        budget: Annotated[float, Between(0, excluded=(0,))] | None = None,
        json_file: str | None = None,
        picture: str | None = None,
    ) -> None:
        """Say what a recipe will need on GPUs: memory by part, what makes it fit, hours, and what a budget is best spent on.

        No weight is loaded: sizes come from config.json, and the memory of a step from running it on tensors without data.

        Args:
            model: Of the recipe.
            datamodule: Of the recipe.
            gpus: Number of GPUs.
            gpu: Which GPU, by its data sheet.
            utilisation: Share of the GPU's FLOP/s that training reaches, 0 to 1.
            length: Tokens of the longest sample of a batch; 0 takes the data's max_length.
            mean_length: Tokens of a sample on average, for hours; 0 takes half of length.
            answer_share: Share of a sample's tokens that are its answer.
            sharded: Whether weights, gradients and moments are spread over the GPUs; by default as the recipe's strategy does.
            price: Of an hour of one GPU, in any currency.
            budget: GPU hours for which the best student size and number of tokens are looked up in scaling laws.
            json_file: Write everything there, too.
            picture: Draw memory and budget there (PNG or SVG).

        Raises:
            ValueError: A number is out of its range, the data module has no length, or the picture has another suffix.
            FileNotFoundError: There is no configuration at the student's or teacher's reference.
        """
        check_arguments(Planner.plan, locals(), "")
        assert isinstance(model, StudentModule)
        longest = length or getattr(datamodule, "max_length", None)
        if not longest:
            raise ValueError(
                "expected the length of the longest sample, found none in the data's max_length; give --length"
            )
        if picture and Path(picture).suffix not in (".png", ".svg"):
            raise ValueError(f"expected a --picture that ends with .png or .svg, found {picture!r}; rename it")
        machine = Machine(gpus, GPUS[gpu], bool(sharded), utilisation)
        work = planning.workload_of(
            model, datamodule, self, length=longest, mean_length=mean_length or longest / 2, answer_share=answer_share
        )
        found = planning.memory(work, machine)
        fitting = planning.what_fits(work, machine)
        rows = planning.phases(work, machine)
        plan: dict[str, Any] = {
            "machine": {
                "gpus": gpus,
                "name": gpu,
                "gpu": vars(GPUS[gpu]),
                "sharded": bool(sharded),
                "utilisation": utilisation,
            },
            "memory": found,
            "fits_with": fitting and fitting[0],
            "memory_then": fitting and fitting[1],
            "phases": rows,
            "costs": planning.costs(rows, machine, price),
        }
        if budget is not None:
            plan["guidance"] = planning.guidance(budget, work, machine)
        print(planning.in_words(plan))
        if json_file:
            write_file(Path(json_file), lambda path: path.write_text(json.dumps(plan, indent=1) + "\n"))
        if picture:
            _draw(plan, Path(picture))


def _draw(plan: dict[str, Any], path: Path) -> None:
    """Memory as a bar of parts against what is usable; with a budget, the loss by size of the student."""
    found, advice = plan["memory"], plan.get("guidance")
    figure, axes = plt.subplots(
        1, 2 if advice else 1, figsize=(10 if advice else 6, 3), squeeze=False, layout="constrained"
    )
    memory, left = axes[0][0], 0.0
    for part in _PARTS:
        size = found["parts"].get(part, 0) / planning.GB
        memory.barh("parts", size, left=left, label=part)
        left += size
    for moment, size in found["moments"].items():
        memory.barh(moment, size / planning.GB, color="0.7")
    memory.axvline(found["usable"] / planning.GB, color="black", linestyle="--", label="usable")
    memory.set_xlabel("GB on one GPU")
    memory.legend(fontsize=7, ncols=2)
    if advice:
        sizes = [way["parameters"] / 1e9 for way in advice["ways"]]
        for number, law in enumerate(LAWS):
            axes[0][1].plot(sizes, [way["losses"][number] for way in advice["ways"]], label=law.source)
        axes[0][1].set_xscale("log")
        axes[0][1].set_xlabel("billion parameters, all with the same budget")
        axes[0][1].set_ylabel("nats a token")
        axes[0][1].legend(fontsize=7)
    write_file(path, lambda place: figure.savefig(place, dpi=150, format=path.suffix.removeprefix(".")))
    plt.close(figure)
