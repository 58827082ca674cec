"""Trains the shared weights of an experiment with several processes, before the search or in its place after a stop.

Run: torchrun --nproc-per-node 2 -m nas.search.supernet EXPERIMENT [--set KEY=VALUE]; then `nas search` with the same
settings finds them. On several machines the run folder and the cache must be shared folders.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

from nas.core.errors import ConfigError, NasError
from nas.recipe.context import open_context
from nas.recipe.processes import started_processes
from nas.recipe.supernet import SupernetStep, train_supernet
from nas.search.experiment import load_experiment
from nas.search.folder import RunFolder
from nas.search.prepare import load_inputs, prepare_training
from nas.train.compute import check_accelerator


class _Lines:
    """A reporter of lines on standard error."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def warn(self, text: str) -> None:
        self.say(f"warning: {text}")

    def progress(self, stage: str, done: float, total: float, note: str = "") -> None:
        """Nothing: parts of seconds are not told."""


def train(experiment: Path, sets: list[str]) -> None:
    """All of it, in one of the processes; the first one makes what all of them read.

    Raises:
        NasError: as a search would.
    """
    with started_processes() as processes:
        e = load_experiment(experiment, sets)
        if e.search.scorer != "supernet":
            raise ConfigError(f"{experiment}: search.scorer is {e.search.scorer!r}; shared weights are for 'supernet'")
        if e.supernet.latency_weight:
            raise ConfigError(
                f"{experiment}: supernet.latency_weight needs the latency table, which only a search has. Run: nas "
                "search, or set it to 0"
            )
        check_accelerator(e.search.accelerator)
        reporter = _Lines()
        inputs = load_inputs(e, reporter)
        folder = RunFolder(e.run_dir)
        path = folder.path / "context.json"
        if processes.writes:
            folder.path.mkdir(parents=True, exist_ok=True)
            prepare_training(inputs, folder, reporter)
        processes.wait()

        def told(step: SupernetStep) -> None:
            if processes.writes and step.step % e.supernet.checkpoint_steps == 0:
                reporter.say(f"supernet: step {step.step} of {step.steps}, loss {step.loss:.3f}")

        targets = {side: open_context(str(path.resolve()), side).targets for side in inputs.space.resolution}
        home = folder.path / "supernet"
        done = train_supernet(
            inputs.space,
            targets,
            e.distill,
            e.supernet,
            home,
            progress=told,
            processes=processes,
            accelerator=e.search.accelerator,
        )
        if processes.writes:
            reporter.say(f"{home}: {done.steps} steps, {done.cpu_s:.0f} CPU s of {processes.count} processes")


def main(arguments: list[str]) -> int:
    """Gives the exit code."""
    options = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    options.add_argument("experiment", type=Path)
    options.add_argument("--set", dest="sets", action="append", default=[], metavar="KEY=VALUE")
    chosen = options.parse_args(arguments)
    try:
        train(chosen.experiment, chosen.sets)
    except NasError as e:
        print(f"error: {e}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
