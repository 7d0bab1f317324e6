"""Train: `python train.py {fit,validate,test,predict,plan} --config configs/<recipe>.yaml`, the Lightning command line.

Every run writes into a new numbered folder `runs/<name>-<number>`.  With `--ckpt_path`, structure and weights come from
the checkpoint; a setting on the command line or in a recipe wins over the saved one, and every difference is logged.
"""

import copy
import gc
import os
import signal
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from program.screen import as_command, one_sentence

gc.disable()  # importing makes half a million objects that stay: collecting among them takes a third of the time
# The tokenizers library warns in forked loader workers otherwise.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

from jsonargparse import Namespace
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import ArgsType, LightningArgumentParser, LightningCLI, SaveConfigCallback
from lightning.pytorch.loggers import WandbLogger
from lightning.pytorch.utilities import rank_zero_info
from lightning.pytorch.utilities.exceptions import MisconfigurationException, SIGTERMException

import callbacks
import datamodules
import models
from models.loading.checkpoint import REFERENCES, plain_settings, read_checkpoint
from models.planning.planner import Planner
from program.ranges import Between, check_range
from program.recipes import ConfigFile, Parser, callbacks_of, class_at, flatten, refuse_nulls
from program.run_folder import drop_empty_run_folder, run_folder

gc.freeze()  # nor is any of them looked at again, in training or at exit
gc.enable()


class RunConfigCallback(SaveConfigCallback):
    """Save the resolved configuration as `config.yaml` in the run's folder, and send it to loggers that keep one."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Nothing yet: a run that its preflight refuses leaves nothing behind."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save once the preflight has passed, or when another command begins."""
        if not trainer.sanity_checking:
            super().setup(trainer, pl_module, str(trainer.state.fn))

    on_validation_start = on_test_start = on_predict_start = on_train_start

    def save_config(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write the file (rank 0)."""
        folder = Path(trainer.default_root_dir)
        folder.mkdir(parents=True, exist_ok=True)
        config = _relocatable(self.config, folder)
        self.parser.save(config, folder / "config.yaml", skip_unset=False, overwrite=True, multifile=False)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                logger.experiment.config.update({"run": self.config.as_dict()}, allow_val_change=True)


class PotstillCLI(LightningCLI):
    """LightningCLI plus: numbered run folders, checkpoints that give way to the command line, one always-on checkpoint."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self._given: ArgsType = kwargs.get("args")
        super().__init__(*args, **kwargs)

    def init_parser(self, **kwargs: Any) -> LightningArgumentParser:
        """Lightning's, with our way of reading files."""
        parser = self.parser_class(**kwargs)
        described = "Recipe or overlay in YAML; may be given several times."
        parser.add_argument("-c", "--config", action=ConfigFile, help=described)
        return parser

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """Run folder, checkpointing, and the tokenizer's link from model to data."""
        parser.usage = (
            "%(prog)s --config RECIPE.yaml [--config OVERLAY.yaml ...] [--SETTING VALUE ...]\n"
            "       %(prog)s --model.help CLASS | --data.help CLASS | --trainer.callbacks.help CLASS\n\n"
            "Settings are named as in recipes, such as --trainer.max_steps 100 or --data.init_args.train my.jsonl."
        )
        parser.add_argument(
            "--name", type=str, default="run", help="Name of the run: its folder is <root>/<name>-<number>."
        )
        parser.add_argument("--root", type=str, default="runs", help="Folder of all runs.")
        parser.add_argument(
            "--run_dir", type=str | None, default=None, help="Folder of this run, not a new numbered one."
        )
        parser.add_lightning_class_args(callbacks.Checkpoint, "checkpoint")
        parser.link_arguments("model.init_args.student", "data.init_args.tokenizer")

    @staticmethod
    def subcommands() -> dict[str, set[str]]:
        """Lightning's, and `plan`, see `Planner`."""
        return {**LightningCLI.subcommands(), "plan": {"model", "datamodule"}}

    def before_instantiate_classes(self) -> None:
        """Choose the run's folder and hand it to trainer and loggers; choose how often to log, and the progress bar."""
        config = self.config[self.subcommand]
        if self.subcommand == "plan":  # for GPUs that need not be here; nothing is written
            if config.sharded is None:
                config.sharded = any(name in str(config.trainer.strategy).lower() for name in ("modelparallel", "fsdp"))
            config.trainer.update(Namespace(accelerator="cpu", devices=1, num_nodes=1, strategy="auto", logger=False))
            return
        refuse_nulls(config, {"checkpoint": (callbacks.Checkpoint, config.checkpoint)})
        # Lightning would hang on the first, and end a run of no step as if all was well on the second.
        for name, least in {"accumulate_grad_batches": 1, "limit_train_batches": 1e-9}.items():
            check_range(f"trainer.{name}", config.trainer[name], Between(least, 1e9))
        self.run_dir = run_folder(config)
        config.trainer.default_root_dir = str(self.run_dir)
        if config.trainer.logger in (None, True):
            config.trainer.logger = Namespace(
                class_path="lightning.pytorch.loggers.CSVLogger",
                init_args=Namespace(save_dir=".", name="", version="", flush_logs_every_n_steps=1),  # a kill loses none
            )
        for logger in _loggers(config):
            if logger.init_args.get("save_dir", "") in (None, "."):
                # Absolute: W&B writes from a process of its own, which may have another working directory.
                logger.init_args.save_dir = str(self.run_dir.absolute())
        if (steps := config.trainer.max_steps) > 0:  # a short run logs as well: at its last step at the latest
            chosen = config.trainer.log_every_n_steps
            config.trainer.log_every_n_steps = min(50, max(1, steps // 20)) if chosen is None else min(chosen, steps)
        has_bar = any("ProgressBar" in callback.class_path for callback in callbacks_of(config))
        if config.trainer.enable_progress_bar is not False and not has_bar:
            self.trainer_defaults["callbacks"].append(callbacks.TrainingProgress())

    def _instantiate_trainer(self, config: Any, callbacks: list[Callback]) -> Trainer:
        """Lightning refuses some settings by their type, and two callbacks of one class by their state."""
        try:
            return super()._instantiate_trainer(config, callbacks)
        except (TypeError, RuntimeError) as error:
            raise ValueError(
                f"expected settings that the trainer takes, found others ({error}); change them in the recipe"
            ) from error

    def before_fit(self) -> None:
        """A test split that nothing reads during training is not passed over in silence."""
        judged = any(isinstance(callback, callbacks.PhaseEvaluation) for callback in self.trainer.callbacks)  # type: ignore[attr-defined]
        if self.config.fit.data.init_args.get("test") and not judged:
            rank_zero_info(
                "The test split is not read by this recipe: judge on it afterwards with `python train.py test` and --ckpt_path, or list "
                "PhaseEvaluation among trainer.callbacks"
            )

    def _parse_ckpt_path(self) -> None:
        """Settings in rising order of precedence: defaults, checkpoint, recipe and command line."""
        config = self.config[self.config.subcommand]
        path = config.get("ckpt_path")
        if not path:
            return
        hyper_parameters = read_checkpoint(Path(path), settings_only=True)["hyper_parameters"]
        class_path, found = config.model.class_path, hyper_parameters.get("_class_path")
        if found != class_path:
            rank_zero_info(f"The checkpoint was written by {found!r}: all settings come from the command line")
            return
        saved, refused = plain_settings(class_at(class_path), hyper_parameters)
        if refused:
            rank_zero_info(
                f"Not taken over from the checkpoint, as it is no plain setting of ours: {', '.join(map(repr, refused))}; the recipe "
                "and the command line decide"
            )
        arguments = sys.argv[1:] if self._given is None else self._given
        explicit = self.parser.parse_args(arguments, defaults=False)[self.config.subcommand]  # type: ignore[arg-type]
        merged = {"class_path": class_path, "init_args": _merge(saved, explicit.model.init_args.as_dict())}
        # The parser fills what neither names with defaults; whatever differs from the checkpoint was asked for.
        self.config = self.parser.parse_object({self.config.subcommand: {"model": merged}}, self.config)
        said = saved | {name: hyper_parameters[name] for name in REFERENCES if name in hyper_parameters}
        before, now = flatten(said), flatten(self.config[self.config.subcommand].model.init_args.as_dict())
        for key in sorted(before.keys() | now.keys()):
            if before.get(key) != now.get(key):
                rank_zero_info(f"model.{key}: {before.get(key)!r} in the checkpoint, {now.get(key)!r} now")


def _relocatable(config: Namespace, folder: Path) -> Namespace:
    """The configuration without this run's folder, so that a run started from it gets a folder of its own."""
    config = copy.deepcopy(config)
    # Left out, not null: a null in a file that is named after `--ckpt_path` on the command line would take it back.
    for key in ("run_dir", "ckpt_path", "trainer.default_root_dir"):
        config.pop(key, None)
    for logger in _loggers(config):
        if logger.init_args.get("save_dir") == str(folder.absolute()):
            logger.init_args.save_dir = "."
    return config


def _loggers(config: Namespace) -> list[Namespace]:
    loggers = config.trainer.logger if isinstance(config.trainer.logger, list) else [config.trainer.logger]
    return [logger for logger in loggers if isinstance(logger, Namespace)]


def _merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` on top of `base`, key by key; a changed class takes none of the old one's settings."""
    if over.get("class_path", base.get("class_path")) != base.get("class_path"):
        return dict(over)
    merged = dict(base)
    for key, value in over.items():
        both = isinstance(value, Mapping) and isinstance(base.get(key), Mapping)
        merged[key] = _merge(base[key], value) if both else value
    return merged


def main(args: ArgsType = None) -> PotstillCLI:
    """Run the command line; `args` replaces `sys.argv` in tests."""
    return PotstillCLI(
        models.StudentModule,
        datamodules.ChatDataModule,
        trainer_class=Planner,
        subclass_mode_model=True,
        subclass_mode_data=True,
        auto_configure_optimizers=False,
        parser_class=Parser,
        save_config_callback=RunConfigCallback,
        save_config_kwargs={"save_to_log_dir": False},
        trainer_defaults={"callbacks": [callbacks.Preflight()], "enable_model_summary": False},
        args=args,
    )


@as_command
def entry_point(args: Sequence[str] | None = None) -> int:
    """`main` for people, see `program.screen.as_command`; a run that was asked to stop says so by its exit code."""
    try:
        main(None if args is None else list(args))
    except MisconfigurationException as error:  # Lightning's, of settings
        raise ValueError(one_sentence(str(error))) from error
    except SIGTERMException as stop:  # Lightning's own has no exit code, and would tell make and SLURM that all is well
        return stop.code if isinstance(stop.code, int) else 128 + signal.SIGTERM
    except KeyboardInterrupt:
        return 128 + signal.SIGINT
    except SystemExit as stop:
        if isinstance(stop.__context__, KeyboardInterrupt):  # the trainer's answer to it, before training or after
            return 128 + signal.SIGINT
        raise
    finally:
        drop_empty_run_folder()
    return 0


if __name__ == "__main__":
    sys.exit(entry_point())
