"""`python -m bench paper`: trains what an experiment of the paper needs, and writes its table."""

import argparse
import shlex
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from bench.paper import runner
from bench.paper.experiments import EXPERIMENTS, MEDIUM_SEEDS, SCALES, Training, names_at, trainings_of
from bench.paper.runner import Job
from prunetrain_kernels.errors import InputError

RUNS, OUT = Path("runs/paper"), Path("bench/results/paper")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `paper`; its `run` returns the exit code: 1 if a training failed, 130 if it was interrupted."""
    about = "\n".join(f"  {e.name:<6} {e.place}: {e.what} ({', '.join(e.scales)})" for e in EXPERIMENTS.values())
    parser = commands.add_parser(
        "paper",
        help="the paper's tables and figures, from whole trainings: ours beside the paper's numbers",
        description="Runs the trainings of the paper's experiments, each once, resumes what was cut off, skips what\n"
        "is done, and writes OUT/SCALE/EXPERIMENT.csv and .md: our numbers beside the paper's. At medium scale\n"
        "what is to be committed of each finished run is copied to OUT/medium/RUN, and the tables come from there.\n\n"
        + about,
        epilog="example: python -m bench paper tab1 tab4 --scale small --data cifar10=PATH --jobs 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_paper)
    add = parser.add_argument
    add("experiment", nargs="+", metavar="EXPERIMENT", help="as listed above; all: every one that the scale has")
    add(
        "--scale",
        choices=SCALES,
        required=True,
        help="full: the paper's settings, for a GPU; medium: all of CIFAR-10, hours of a CPU core for each training; "
        "small: a CIFAR-10 subset, which proves plumbing only",
    )
    add(
        "--data",
        nargs="+",
        action="extend",
        default=[],
        metavar="[NAME=]PATH",
        help="cifar10, cifar100 or imagenet, as --data of `prunetrain train` takes it; the name may be left out where "
        "the path says it; what has no data is skipped",
    )
    add("--runs", type=Path, default=RUNS, help=f"folder of the run folders (default: {RUNS})")
    add("--out", type=Path, default=OUT, help=f"folder of the tables (default: {OUT})")
    add("--jobs", type=int, default=1, metavar="N", help="trainings side by side (default: 1)")
    add("--device", default="auto", help="cpu, cuda, cuda:1, ...; auto takes a GPU if there is one (default: auto)")
    add("--threads", type=int, metavar="N", help="CPU threads of each training (default: 1 but at full scale)")
    add("--seeds", type=int, metavar="N", help=f"train seeds 0 to N - 1 (default: 1, at medium scale {MEDIUM_SEEDS})")
    add("--only", default="", metavar="TEXT", help="train only what has this in its folder's name")
    add("--dry-run", action="store_true", help="say what would be trained, with the commands, and stop")
    add("--tabulate", action="store_true", help="train nothing; write the tables of what is finished")
    _add_committed(add)
    add("--overwrite", action="store_true", help="train anew where a folder holds a run with other options")
    add(
        "--train-options",
        default="",
        metavar="TEXT",
        help="further options of `prunetrain train` for every training, which win over the experiment's own, such as "
        "--train-options='--amp fp16 --fuse'",
    )


def _add_committed(add: Callable[..., Any]) -> None:
    """Options about committed runs."""
    add(
        "--adopt",
        type=Path,
        nargs="+",
        default=[],
        metavar="RUN",
        help="at medium scale: train nothing; take in run folders that `prunetrain train` made with the same options, "
        "and write the tables",
    )
    add(
        "--time-steps",
        action="store_true",
        help="at medium scale: train nothing; time a step of every committed run's last shape beside the dense one's, "
        "append to OUT/medium/steps.csv, and write the tables",
    )
    add("--even-if-busy", action="store_true", help="let --time-steps measure on a machine that does other work")


def _paper(options: argparse.Namespace) -> int:
    names = list(dict.fromkeys(options.experiment))
    if "all" in names:
        names = names_at(options.scale)
    for name, value in (("jobs", options.jobs), ("threads", options.threads)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    if options.seeds is None:
        options.seeds = MEDIUM_SEEDS if options.scale == "medium" else 1
    trainings = trainings_of(names, options.scale, options.seeds)
    if (options.adopt or options.time_steps) and options.scale != "medium":
        raise InputError("--adopt and --time-steps are about committed runs, which only --scale medium has.")
    if options.train_options and options.scale == "medium":
        raise InputError("the medium scale's options are fixed, so that its runs compare; leave --train-options out.")
    looking = [flag for flag in ("tabulate", "adopt", "time_steps") if getattr(options, flag)]
    if looking and options.dry_run:
        flag = looking[0].replace("_", "-")
        raise InputError(f"--{flag} trains nothing, so it cannot go with --dry-run; choose one.")
    code = 0
    if options.adopt:
        _adopt_given(options)
    if options.time_steps:
        _time_steps(trainings, options)
    if not looking:
        jobs = _plan(trainings, options)
        if options.dry_run:
            _show(jobs)
            return 0
        try:
            code = 1 if runner.run(jobs, options.jobs, _say) else 0
        except runner.Interrupted:
            return 130
        finally:
            if options.scale == "medium":
                _adopt_finished(jobs, options.out)
    _tabulate(names, options)
    return code


def _plan(trainings: list[Training], options: argparse.Namespace) -> list[Job]:
    """The trainings that are to be run: committed ones are left out, unless --overwrite asks for them again."""
    from bench.paper import committed

    data = runner.parse_data(options.data)
    chosen = _chosen(trainings, data, options.only)
    if options.scale == "medium" and not options.overwrite:
        there = {t.path for t in chosen if committed.is_committed(options.out, t)}
        left = [t for t in chosen if t.path not in there]
        needed = {t.start.path for t in left if t.start is not None}
        for training in chosen:
            if training.path in there and training.path not in needed:
                _say(f"committed already: {training.name}")
        chosen = [t for t in chosen if t.path not in there or t.path in needed]
    return runner.plan(
        chosen,
        options.runs,
        data,
        device=options.device,
        threads=1 if options.threads is None and options.scale != "full" else options.threads,
        extra=options.train_options,
        overwrite=options.overwrite,
    )


def _adopt_finished(jobs: list[Job], out: Path) -> None:
    from bench.paper import committed

    for job in jobs:
        if (job.folder / "summary.json").exists():
            _say_adopted(job.folder, committed.adopt(job.folder, job.training, out))


def _adopt_given(options: argparse.Namespace) -> None:
    from bench.paper import committed

    # of all experiments, and of as many seeds as anyone trained
    known = trainings_of(names_at(options.scale), options.scale, max(options.seeds, 10))
    matches = {folder: committed.matching(folder, known) for folder in options.adopt}  # all of them, or none
    for folder, training in matches.items():
        changed = committed.adopt(folder, training, options.out)
        _say(f"{folder} is {training.name}")
        _say_adopted(folder, changed)


def _say_adopted(folder: Path, changed: list[Path]) -> None:
    if changed:
        _say(f"copied, to be committed: {', '.join(str(path) for path in changed)}")
    if not (folder / "checkpoint.pt").exists():
        _say(f"{folder} has no checkpoint.pt: Fig. 6 cannot count its gating")


def _time_steps(trainings: list[Training], options: argparse.Namespace) -> None:
    from bench.paper import committed, steps
    from prunetrain_kernels.train.run_log import read_run

    wanted = [t for t in trainings if t.method != "dense" and options.only in t.path]
    there = [t for t in wanted if committed.is_committed(options.out, t)]
    if not there:
        where = options.out / options.scale
        raise InputError(f"no pruned run of these is committed in {where}: there is nothing to time.")
    load = steps.load_of_an_idle_machine(even_if_busy=options.even_if_busy)
    for training in there:
        run = read_run(committed.folder_of(options.out, training))
        lines = steps.measure(training.path, run, options.device, load)
        steps.append(options.out / options.scale / steps.FILE, lines)
        seconds = ", ".join(f"{line['provider']} {line['p50_s']:.4f} s" for line in lines)
        _say(f"{training.name}: {seconds}")


def _chosen(trainings: list[Training], data: dict[str, str], only: str) -> list[Training]:
    """The trainings that have data and hold `only` in their path, and the ones that these start from."""
    unlike = sorted({t.dataset for t in trainings} - set(data))
    with_data = [t for t in trainings if t.dataset in data]
    if not with_data:
        raise InputError(f"there is no data to train on; give --data {' '.join(f'{name}=PATH' for name in unlike)}.")
    for name in unlike:
        count = sum(t.dataset == name for t in trainings)
        _say(f"skipped: {count} trainings on {name}, for which no data is given (--data {name}=PATH)")
    wanted = {t.path for t in with_data if only in t.path}
    wanted |= {t.start.path for t in with_data if t.path in wanted and t.start is not None}
    if not wanted:
        raise InputError(f"no training's folder has {only!r} in its name; --dry-run without --only lists them.")
    return [t for t in with_data if t.path in wanted]


def _show(jobs: list[Job]) -> None:
    for job in jobs:
        _say(f"{job.state:<10}{job.training.path}")
        if job.state != "done":
            _say(f"    {shlex.join(['prunetrain', *job.command[3:]])}")
    done = sum(job.state == "done" for job in jobs)
    _say(f"{len(jobs)} trainings, {done} of them done")


def _tabulate(names: list[str], options: argparse.Namespace) -> None:
    from bench.paper import committed, results, steps, tables

    folder_of, times = None, None
    if options.scale == "medium":
        folder_of = partial(committed.folder_of, options.out)
        times = steps.read(options.out / options.scale / steps.FILE)
    for name in names:
        collected = results.collect(
            name,
            options.scale,
            options.seeds,
            options.runs,
            extra=options.train_options,
            folder_of=folder_of,
            steps=times,
        )
        text = tables.write(collected, options.out)
        if text is None:
            _say(f"\n{name}: nothing is finished, so no table is written. {tables.missing(collected)}")
            continue
        path = options.out / options.scale / name
        _say(f"\n{text}\nwritten: {path}.csv, {path}.md")


def _say(text: str) -> None:
    print(text, flush=True)
