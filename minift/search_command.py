"""`minift train --seeds N` and `minift search`: several runs, with a table at the end."""

import argparse
import json
from collections.abc import Iterator
from pathlib import Path

from .commands import Bar, say
from .errors import InputError, Notice
from .run import Evaluation, Finished
from .search import read_trials, report, search, trials_of
from .train import Step
from .trials import Begun, Ended, Event, fine_tune_seeds


def run(args: argparse.Namespace) -> int:
    """The last line of stdout is the summary."""
    if args.command == "train":
        done = follow(fine_tune_seeds(*args.configurations), args.quiet)
    elif args.show:
        done = show(*args.configurations)
    else:
        done = follow(search(*args.configurations), args.quiet)
    if not args.quiet:
        say("\nvalidation, best models\n" + done.table)
        if best := done.summary.get("best_command"):
            say("\nthe best again:\n" + best)
    print(json.dumps(done.summary))
    return 0


def show(space, run, config) -> Finished:
    """The trials that have ended until now."""
    if not run.output_dir:
        raise InputError("expected --output_dir: see minift search --help")
    trials = trials_of(space, run, config)
    lines = read_trials(Path(run.output_dir), trials)
    if not lines:
        raise InputError(f"{run.output_dir}: expected trials that have ended, found none")
    return report(run, config, trials, lines)


def follow(events: Iterator[Event], quiet: bool) -> Finished:
    """Shows what happens in the runs; what is said of the first is not repeated for the others."""
    bar, finished, said = Bar(quiet), None, set()
    try:
        for event in events:
            if isinstance(event, Step):
                bar.step(event)
            elif isinstance(event, Begun):
                bar.close()
                bar = Bar(quiet)
                if not quiet:
                    say(event.title)
            elif isinstance(event, Notice):
                if event.text not in said and (event.loud or not quiet):
                    bar.line(("WARNING: " if event.loud else "") + event.text)
                said.add(event.text)
            elif isinstance(event, Evaluation) and not quiet:
                bar.line(f"epoch {event.epoch:.2f}  step {event.step}  {event.headline}")
            elif isinstance(event, Ended) and event.why:
                status = "" if event.status == "finished" else f"{event.status}: "
                bar.line(f"WARNING: {event.name}: {status}{event.why}")
            elif isinstance(event, Finished):
                finished = event
    finally:
        bar.close()
    return finished
