"""`python -m bench paper`: trains what an experiment of the paper needs, and writes its table."""

import argparse
import shlex
from pathlib import Path

from bench.paper import runner
from bench.paper.experiments import EXPERIMENTS, SCALES, Training, trainings_of
from bench.paper.runner import Job
from prunetrain_kernels.errors import InputError

RUNS, OUT = Path("runs/paper"), Path("bench/results/paper")


def add_command(commands: "argparse._SubParsersAction[argparse.ArgumentParser]") -> None:
    """Adds the command `paper`; its `run` returns the exit code: 1 if a training failed, 130 if it was interrupted."""
    about = "\n".join(f"  {e.name:<6} {e.place}: {e.what}" for e in EXPERIMENTS.values())
    parser = commands.add_parser(
        "paper",
        help="the paper's tables and figures, from whole trainings: ours beside the paper's numbers",
        description="Runs the trainings of the paper's experiments, each once, resumes what was cut off, skips what\n"
        "is done, and writes OUT/SCALE/EXPERIMENT.csv and .md: our numbers beside the paper's.\n\n" + about,
        epilog="example: python -m bench paper tab1 tab4 --scale small --data cifar10=PATH --jobs 2",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.set_defaults(run=_paper)
    add = parser.add_argument
    add("experiment", nargs="+", metavar="EXPERIMENT", help="as listed above; all: every one")
    add(
        "--scale",
        choices=SCALES,
        required=True,
        help="full: the paper's settings, for a GPU; small: a CIFAR-10 subset, for a CPU",
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
    add("--threads", type=int, metavar="N", help="CPU threads of each training (default: 1 at small scale)")
    add("--seeds", type=int, default=1, metavar="N", help="train seeds 0 to N - 1 (default: 1)")
    add("--only", default="", metavar="TEXT", help="train only what has this in its folder's name")
    add("--dry-run", action="store_true", help="say what would be trained, with the commands, and stop")
    add("--tabulate", action="store_true", help="train nothing; write the tables of what is finished")
    add("--overwrite", action="store_true", help="train anew where a folder holds a run with other options")
    add(
        "--train-options",
        default="",
        metavar="TEXT",
        help="further options of `prunetrain train` for every training, which win over the experiment's own, such as "
        "--train-options='--amp fp16 --fuse'",
    )


def _paper(options: argparse.Namespace) -> int:
    names = list(EXPERIMENTS) if "all" in options.experiment else list(dict.fromkeys(options.experiment))
    for name, value in (("jobs", options.jobs), ("threads", options.threads)):
        if value is not None and value < 1:
            raise InputError(f"--{name} must be at least 1, not {value}.")
    trainings = trainings_of(names, options.scale, options.seeds)
    code = 0
    if not options.tabulate:
        data = runner.parse_data(options.data)
        chosen = _chosen(trainings, data, options.only)
        threads = 1 if options.threads is None and options.scale == "small" else options.threads
        jobs = runner.plan(
            chosen,
            options.runs,
            data,
            device=options.device,
            threads=threads,
            extra=options.train_options,
            overwrite=options.overwrite,
        )
        if options.dry_run:
            _show(jobs)
            return 0
        try:
            failed = runner.run(jobs, options.jobs, _say)
        except runner.Interrupted:
            return 130
        code = 1 if failed else 0
    elif options.dry_run:
        raise InputError("--tabulate trains nothing, so it cannot go with --dry-run; choose one.")
    _tabulate(names, options)
    return code


def _chosen(trainings: list[Training], data: dict[str, str], only: str) -> list[Training]:
    """Those that have data and hold `only` in their path, and what they start from."""
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
    from bench.paper import results, tables

    for name in names:
        found = results.collect(name, options.scale, options.seeds, options.runs, options.train_options)
        text = tables.write(found, options.out)
        if text is None:
            _say(f"\n{name}: nothing is finished, so no table is written. {tables.missing(found)}")
            continue
        path = options.out / options.scale / name
        _say(f"\n{text}\nwritten: {path}.csv, {path}.md")


def _say(text: str) -> None:
    print(text, flush=True)
