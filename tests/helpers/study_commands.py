"""The command line of a study that trains, with a tiny recipe."""

from pathlib import Path

import yaml

from benchmarks.trained import RECIPE


def study_command(folder: Path, teacher: str, out: str, *, steps: int, train_size: int) -> list[str]:
    """So many steps and two seeds of every arm."""
    recipe = yaml.safe_load(RECIPE.read_text())
    recipe["model"]["init_args"]["on_policy"]["tokens"] = 4
    recipe["data"]["init_args"] |= {"train_size": train_size, "val_size": 3, "batch_size": 2, "eval_batch_size": 4}
    recipe["data"]["init_args"]["tasks"] = {"chain_sum": {"max_terms": 2, "max_digits": 2}}
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    words = ["--teacher", teacher, "--recipe", str(folder / "recipe.yaml"), "--out", str(folder / out)]
    return [*words, "--steps", str(steps), "--seeds", "1", "2", "--test-size", "5", "--json", str(folder / "rows.json")]
