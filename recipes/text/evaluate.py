"""`omnimix text eval`: a run on the tasks of lm-eval, built-in ones or one's own."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from ...errors import ConfigError, UnknownName
from ...interop.importing import source_hidden, wanted
from ...utils.console import emit
from ...utils.devices import usable_device
from ...utils.options import add_device, add_json


def main(argv: list[str]) -> int:
    """`omnimix text eval`."""
    parser = argparse.ArgumentParser(
        prog="omnimix text eval",
        description="Measure a language model on tasks of lm-eval. Your own tasks, on local files, need no network.",
    )
    parser.add_argument("--run", required=True, help="folder of the run, or its name under runs/")
    parser.add_argument("--tasks", required=True, help="names, separated by commas")
    parser.add_argument("--include_path", metavar="DIR", help="folder with the YAML files of further tasks")
    parser.add_argument("--limit", type=int, help="documents of each task; all by default")
    parser.add_argument("--fewshot", type=int, help="solved examples before each question; as the task says by default")
    parser.add_argument("--chat", action="store_true", help="put questions into the tokenizer's chat template")
    parser.add_argument("--samples", type=int, default=32, help="draws of a diffusion model's likelihood")
    parser.add_argument("--seed", type=int, default=0, help="random seed of these examples and of sampled text")
    parser.add_argument("--steps", type=int, help="denoising steps of a diffusion model; default: one per token")
    parser.add_argument("--batch_size", type=int, default=16, help="requests at a time")
    parser.add_argument("--max_length", type=int, help="tokens that the model is given at most; all by default")
    add_device(parser)
    add_json(parser)
    options = parser.parse_args(argv)
    wanted("lm_eval", "omnimix text eval", "eval")
    from ...interop.lm_eval import OmnimixLM

    # lm-eval's decorators hide the arguments of what they decorate.
    of_the_run: Any = OmnimixLM
    model = of_the_run(
        options.run,
        batch_size=options.batch_size,
        device=str(usable_device(options.device)),
        max_length=options.max_length,
        samples=options.samples,
        seed=options.seed,
        steps=options.steps,
    )
    results = evaluate(
        model,
        [name for name in options.tasks.split(",") if name],
        include_path=options.include_path,
        limit=options.limit,
        num_fewshot=options.fewshot,
        apply_chat_template=options.chat,
    )
    emit(f"{options.run}: {model.get_model_info()['likelihood']} likelihoods", result_rows(results), options.json)
    return 0


def evaluate(model: Any, tasks: list[str], *, include_path: str | None = None, **options: Any) -> dict[str, Any]:
    """lm-eval's results of an `OmnimixLM`.

    Args:
        tasks: their names.
        include_path: a folder with the YAML files of further tasks. Where it has all of them, lm-eval's own are not
            even listed.
        options: of `lm_eval.simple_evaluate`.

    Raises:
        UnknownName: no such task.
        ConfigError: no such folder, or no task.
        MissingPackage: lm-eval is not installed.
    """
    wanted("lm_eval", "evaluation", "eval")
    with source_hidden():
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        if not tasks:
            raise ConfigError("tasks: there is none; name one at least")
        if include_path is not None and not Path(include_path).is_dir():
            raise ConfigError(f"include_path is {include_path!r}; there is no such folder")
        manager = TaskManager(include_path=include_path, include_defaults=False) if include_path else None
        if manager is None or not set(tasks) <= set(manager.all_tasks):
            manager = TaskManager(include_path=include_path)
        for name in tasks:
            if name not in manager.all_tasks:
                raise UnknownName("task", name, manager.all_tasks)
        measure: Any = simple_evaluate  # decorated as well
        return measure(model=model, tasks=tasks, task_manager=manager, **{"bootstrap_iters": 1000} | options)


def result_rows(results: dict[str, Any]) -> list[dict[str, Any]]:
    """One row a task and metric, with how its likelihoods were found."""
    rows = []
    for task, found in results["results"].items():
        for key, value in found.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr"):
                continue
            error = found.get(f"{metric}_stderr,{kind}")
            rows.append(
                {
                    "task": task,
                    "metric": metric if kind == "none" else f"{metric} ({kind})",
                    "value": value,
                    "error": error if isinstance(error, float) else None,
                    "documents": results["n-samples"][task]["effective"] if task in results["n-samples"] else None,
                    "fewshot": results["n-shot"].get(task),
                    "likelihood": results["config"]["likelihood"],
                    "likelihood_error": results["config"].get("likelihood_standard_error"),
                }
            )
    return rows
