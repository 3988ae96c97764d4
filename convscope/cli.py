"""The one command. A subcommand's module is imported when it runs, so that `--help` needs no torch."""

import contextlib
import importlib
import io
import os
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from convscope import __version__
from convscope.core.errors import UserError


@dataclass(frozen=True)
class Command:
    """Where a subcommand lives and what it does, in a line."""

    module: str
    config: str
    summary: str
    run: str = "run"


COMMANDS: dict[tuple[str, ...], Command] = {
    ("quickstart",): Command(
        "convscope.quickstart", "QuickstartConfig", "everything once, small, offline: data to report in minutes"
    ),
    ("shards", "build"): Command(
        "convscope.core.data.build", "BuildConfig", "pack a folder, zip, table or data set into webdataset shards"
    ),
    ("shards", "convert"): Command(
        "convscope.core.data.build", "BuildConfig", "the same, of Hugging Face (arrow, parquet) and torchvision sets"
    ),
    ("shards", "check"): Command(
        "convscope.core.data.check", "CheckConfig", "find truncated tars, corrupt images, wrong counts"
    ),
    ("shards", "index"): Command(
        "convscope.core.data.check", "IndexConfig", "write the index beside shards made elsewhere", run="run_index"
    ),
    ("shards", "stats"): Command(
        "convscope.report.shard_stats", "StatsCommand", "formats, sizes, labels and captions as one HTML page"
    ),
    ("pretrain", "spark"): Command(
        "convscope.ssl.commands", "SparkCommand", "masked modeling for convolutional networks (SparK)"
    ),
    ("pretrain", "rotation"): Command("convscope.ssl.commands", "RotationCommand", "rotation prediction (RotNet)"),
    ("pretrain", "clip"): Command(
        "convscope.ssl.clip_command", "ClipCommand", "contrastive image-text training (CLIP, SigLIP, ConVIRT)"
    ),
    ("eval", "linear-probe"): Command(
        "convscope.eval.linear_probe", "LinearProbeCommand", "linear classifiers on frozen features"
    ),
    ("eval", "knn"): Command("convscope.eval.knn", "KnnCommand", "k-nearest-neighbour vote on frozen features"),
    ("eval", "logreg"): Command(
        "convscope.eval.logistic_regression", "LogRegCommand", "logistic regression on frozen features, C swept"
    ),
    ("eval", "svm"): Command("convscope.eval.svm", "SvmCommand", "linear SVMs on frozen features, a class each"),
    ("eval", "few-shot"): Command(
        "convscope.eval.few_shot", "FewShotCommand", "accuracy with one, two, five labels a class, over many draws"
    ),
    ("eval", "data-scaling"): Command(
        "convscope.eval.data_scaling", "DataScalingCommand", "accuracy over the number of labels, and its slope"
    ),
    ("eval", "retrieval"): Command(
        "convscope.eval.retrieval", "RetrievalCommand", "image-to-image and image-text retrieval"
    ),
    ("eval", "landmarks"): Command(
        "convscope.eval.landmarks", "LandmarksCommand", "revisited Oxford and Paris, easy, medium and hard"
    ),
    ("eval", "copy-detection"): Command(
        "convscope.eval.copy_detection", "CopyDetectionCommand", "altered copies look for their originals"
    ),
    ("eval", "zero-shot"): Command(
        "convscope.eval.zero_shot", "ZeroShotCommand", "classes by their names, with an image-text model"
    ),
    ("eval", "fine-tune"): Command(
        "convscope.eval.fine_tune", "FineTuneCommand", "train the whole network on all or a few labels"
    ),
    ("eval", "features"): Command(
        "convscope.eval.features_command", "FeaturesCommand", "features of a frozen backbone as plain arrays"
    ),
    ("eval", "info"): Command(
        "convscope.eval.info", "InfoCommand", "what a checkpoint was recognised as: layout, architecture, preprocessing"
    ),
    ("analyze", "all"): Command(
        "convscope.report.analyze_all", "AllCommand", "every analysis that applies, and one report.html"
    ),
    ("analyze", "erf"): Command("convscope.analysis.erf_command", "ErfCommand", "effective receptive fields"),
    ("analyze", "filters"): Command(
        "convscope.analysis.filters_command",
        "FiltersCommand",
        "convolution filters: in use or not, degenerate layers, drift between models",
    ),
    ("analyze", "linear"): Command(
        "convscope.analysis.linear_command", "LinearCommand", "what pixels and biases add to single features"
    ),
    ("analyze", "efficiency"): Command(
        "convscope.analysis.efficiency_command",
        "EfficiencyCommand",
        "arithmetic, memory traffic and latency of every layer, and the gap to the machine's peak",
    ),
    ("analyze", "representation"): Command(
        "convscope.analysis.representation_command",
        "RepresentationCommand",
        "rank, spread, collapse and similarity of features (RankMe, alpha-ReQ, uniformity, CKA)",
    ),
    ("analyze", "shape-bias"): Command(
        "convscope.analysis.shape_bias_command", "ShapeBiasCommand", "shape or texture on cue conflicts (Geirhos)"
    ),
    ("export", "backbone"): Command(
        "convscope.core.export", "ExportBackbone", "a backbone as a file that timm loads", run="run_backbone"
    ),
    ("export", "open-clip"): Command(
        "convscope.core.export", "ExportOpenClip", "an image-text model as open_clip loads it", run="run_open_clip"
    ),
    ("export", "filter-db"): Command(
        "convscope.analysis.filter_db_command", "FilterDbCommand", "convolution filters as a database (CNN Filter DB)"
    ),
    ("slurm", "status"): Command(
        "convscope.slurm.commands", "RunCommand", "state, progress and speed of a submitted run", run="run_status"
    ),
    ("slurm", "logs"): Command("convscope.slurm.commands", "LogsCommand", "its logs", run="run_logs"),
    ("slurm", "cancel"): Command("convscope.slurm.commands", "RunCommand", "cancel its job", run="run_cancel"),
    ("slurm", "resume"): Command(
        "convscope.slurm.commands", "RunCommand", "submit it again, as it was last", run="run_resume"
    ),
    ("report",): Command(
        "convscope.report.runs", "ReportCommand", "compare runs and results: HTML, Markdown, CSV, LaTeX"
    ),
}


BUDGETS = ("--epochs", "--steps", "--samples")


def main(argv: Sequence[str] | None = None) -> None:
    """Run `convscope ARGV`; exits with 2 and one line on a mistake the user can mend."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    debug = "--debug" in arguments
    arguments = [argument for argument in arguments if argument != "--debug"]
    try:
        _dispatch(arguments)
        sys.stdout.flush()  # here, where a reader that has gone is no error
    except UserError as error:
        if debug:
            raise
        _fail(str(error))
    except KeyboardInterrupt:
        if debug:
            raise
        print("interrupted", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    except OSError as error:
        if debug or error.filename is None:
            raise
        _fail(f"{error.filename}: {error.strerror}")


def linear_probe() -> None:
    """`linear-probe MODEL ...`, so that a shell's `eval linear-probe MODEL` works as typed."""
    main(["eval", "linear-probe", *sys.argv[1:]])


def knn_probe() -> None:
    """`knn-probe MODEL ...` is `convscope eval knn MODEL ...`."""
    main(["eval", "knn", *sys.argv[1:]])


def retrieval_probe() -> None:
    """`retrieval-probe MODEL ...` is `convscope eval retrieval MODEL ...`."""
    main(["eval", "retrieval", *sys.argv[1:]])


def _fail(message: str) -> None:
    rank = os.environ.get("RANK", "0")
    if rank != "0":  # what all processes run into is told once: the launcher ends the others when the first one ends
        time.sleep(2)
        message = f"process {rank}: {message}"
    print(f"convscope: error: {' '.join(message.split())}", file=sys.stderr)
    raise SystemExit(2)


def _dispatch(arguments: list[str]) -> None:
    if arguments and arguments[0] in ("--version", "-V"):
        print(f"convscope {__version__}")
        return
    if name := _command_of(arguments):
        _run(name, arguments[len(name) :])
        return
    words = [argument for argument in arguments if not argument.startswith("-")]
    group = words[0] if words else None
    known = {name[0] for name in COMMANDS}
    if group is not None and group not in known:
        raise UserError(f"no command {group!r}; commands: {', '.join(sorted(known))} (see convscope --help)")
    if len(words) > 1:
        inside = ", ".join(name[1] for name in COMMANDS if name[0] == group and len(name) > 1)
        raise UserError(f"no command '{' '.join(words[:2])}'; {group} has: {inside}")
    print(_help(group))


def _help(group: str | None) -> str:
    rows = {" ".join(name): command.summary for name, command in COMMANDS.items() if group in (None, name[0])}
    width = max(map(len, rows))
    lines = [f"  convscope {name:<{width}}  {summary}" for name, summary in rows.items()]
    head = f"convscope {__version__}: pretrain vision backbones without labels and see what they learned"
    foot = "Options of a command: convscope COMMAND --help. A full traceback of an error: --debug."
    return "\n".join([head, "", *lines, "", foot])


def _command_of(words: Sequence[str]) -> tuple[str, ...] | None:
    return next((tuple(words[:length]) for length in (1, 2) if tuple(words[:length]) in COMMANDS), None)


def parse(line: Sequence[str]) -> tuple[tuple[str, ...], Any]:
    """The command that a line names, and the settings that it would run with.

    Raises:
        UserError: no such command, or it refuses a flag.
    """
    name = _command_of(line)
    if name is None:
        raise UserError(f"no command '{' '.join(line[:2])}' (see convscope --help)")
    module = importlib.import_module(COMMANDS[name].module)
    config_class = getattr(module, COMMANDS[name].config)
    arguments, saved = _take_option(list(line[len(name) :]), "--config")
    arguments, preset = _take_option(arguments, "--preset")
    if preset is not None:
        arguments = _preset_flags(module, config_class, preset, arguments) + _other_budgets_off(arguments)
    elif saved is not None:
        arguments = _other_budgets_off(arguments)
    return name, _parse(config_class, arguments, f"convscope {' '.join(name)}", saved)


def _run(name: tuple[str, ...], arguments: list[str]) -> None:
    arguments, slurm = _take_slurm(arguments)
    arguments, sweep = _take_option(arguments, "--sweep")
    if sweep is not None and slurm is None:
        raise UserError("a sweep is an array of jobs: add --slurm.* flags, or --slurm.local to run it here")
    line = [*name, *arguments]
    if slurm is None:
        _, config = parse(line)
        getattr(importlib.import_module(COMMANDS[name].module), COMMANDS[name].run)(config)
        return
    from convscope.slurm.submit import submit

    submit(line, slurm, None if sweep is None else Path(sweep))


def _take_slurm(arguments: list[str]) -> tuple[list[str], Any]:
    if not any(argument.startswith("--slurm.") for argument in arguments):
        return arguments, None
    from convscope.slurm.settings import split

    return split(arguments)


def _take_option(arguments: list[str], flag: str) -> tuple[list[str], str | None]:
    """Remove `flag VALUE` or `flag=VALUE` from the arguments."""
    for i, argument in enumerate(arguments):
        if argument.startswith(f"{flag}="):
            return arguments[:i] + arguments[i + 1 :], argument.partition("=")[2]
        if argument == flag:
            if i + 1 == len(arguments):
                raise UserError(f"{flag} needs a value")
            return arguments[:i] + arguments[i + 2 :], arguments[i + 1]
    return arguments, None


def _other_budgets_off(arguments: list[str]) -> list[str]:
    """A budget given as a flag takes the place of a preset's or a saved one, of whatever kind that is."""
    given = {budget for budget in BUDGETS for argument in arguments if argument.split("=")[0] == budget}
    return [word for other in BUDGETS if given and other not in given for word in (other, "None")] + arguments


def _preset_flags(module: Any, config_class: Any, name: str, arguments: list[str]) -> list[str]:
    """A preset is a set of flags that stand before the user's own, which therefore win."""
    if not hasattr(module, "preset"):
        raise UserError("this command has no presets")
    values: Mapping[str, Any] = module.preset(config_class, name, arguments)
    flags: list[str] = []
    for key, value in values.items():
        flag = key.replace("_", "-")
        if isinstance(value, bool):
            flags.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            items = value if isinstance(value, list) else [value]
            flags += [f"--{flag}", *(str(item) for item in items)]
    return flags


def _parse(config_class: Any, arguments: list[str], program: str, saved: str | None) -> Any:
    import tyro

    from convscope.core.config import from_dict, load_yaml

    options: dict[str, Any] = {"prog": program, "args": arguments}
    if saved is not None:
        options["default"] = from_dict(config_class, load_yaml(Path(saved)), saved)
    if {"-h", "--help"} & set(arguments):
        return tyro.cli(config_class, **options)
    said = io.StringIO()
    try:
        with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
            return tyro.cli(config_class, **options)
    except SystemExit as exit_:
        if not exit_.code:
            raise
        raise UserError(f"{_one_line(said.getvalue())} (see {program} --help)") from None


def _one_line(boxed: str) -> str:
    """tyro's boxed message as plain words."""
    words = re.sub("\x1b\\[[0-9;]*m|[─-╿]", " ", boxed)
    lines = [" ".join(line.split()) for line in words.splitlines()]
    rule, noise = {"-"}, ("For full helptext", "Parsing error")
    said = [line for line in lines if line and set(line) != rule and not line.startswith(noise)]
    if len(said) > 1 and said[1].startswith(said[0]):  # a title that the first line repeats
        said = said[1:]
    return " ".join(said).split(" Full helptext")[0].strip()
