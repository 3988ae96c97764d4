"""`convscope analyze shape-bias`: shape or texture, of models, people and networks."""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import tyro

from convscope.analysis.category_heads import LabelledImages, labelled_images
from convscope.analysis.common import load_models, model_records, one_or_all
from convscope.analysis.cue_conflict import cue_conflict
from convscope.analysis.cue_preference import CuePreferenceConfig, drawings, measure, random_pairings
from convscope.analysis.deciders import HeadConfig, deciders
from convscope.analysis.observers import Answers, read_observers
from convscope.analysis.shape_bias import Row, ask, consistency, read_stimuli
from convscope.analysis.shape_bias_output import CueReport, details, figures, table, write
from convscope.analysis.sixteen_categories import CATEGORIES
from convscope.core.data.cue_conflict_render import SHAPE_NAMES
from convscope.core.data.image_files import open_images
from convscope.core.errors import UserError
from convscope.core.log import info
from convscope.core.models import model_record
from convscope.core.results import EvalResult

TASK, CUE_TASK = "shape-bias", "cue-preference"
BUILTIN = "builtin"


@dataclasses.dataclass(frozen=True, kw_only=True)
class ShapeBiasCommand(HeadConfig, CuePreferenceConfig):
    """Shape bias on cue-conflict stimuli, beside untrained twins and the study's observers."""

    models: tyro.conf.Positional[tuple[str, ...]] = ()
    """MODELs; none where only observers are compared."""
    stimuli: str = BUILTIN
    """Geirhos' stimuli: category folders with names such as cat3-elephant2.png, a zip of them, or shards. builtin:
    drawn silhouettes and textures, whose result is the procedural cue preference, not the shape bias."""
    split: str = "test"
    """Split of shards with stimuli."""
    observers: str | None = None
    """The study's responses of people and networks: a CSV file, or a folder or zip of them."""
    compat: Literal["none", "modelvshuman"] = "none"
    """modelvshuman: of categories with the same score the last is taken, and shares are of all stimuli, as there."""
    output_dir: Path = Path("results")
    """Where shape-bias.json, .npz, .csv and the plots go; cue-preference.json, ... of builtin."""

    def __post_init__(self) -> None:
        HeadConfig.__post_init__(self)
        CuePreferenceConfig.__post_init__(self)
        if not self.models and self.observers is None:
            raise UserError("shape-bias: name at least one MODEL, or response tables with --observers")
        if self.probe is not None and len(self.models) > 1:
            raise UserError("shape-bias: --probe is of one model; name one MODEL")
        if not self.is_builtin:
            return
        if self.observers is not None and self.models:
            raise UserError("shape-bias: observers saw Geirhos' stimuli: show them to the models too, with --stimuli")
        if self.models and (self.head != "auto" or self.train_data or self.probe):
            raise UserError("shape-bias: --stimuli builtin has a probe of its own: leave --head and what it needs out")

    @property
    def is_builtin(self) -> bool:
        """Whether the embedded set is used."""
        return self.stimuli == BUILTIN


def run(config: ShapeBiasCommand) -> None:
    """Ask models and observers, write the files and print a table."""
    result, report = cue_preference(config) if config.is_builtin and config.models else shape_bias(config)
    names = write(config.output_dir, result.task, result, report)
    print(table(report))
    if report.consistency is not None:
        info("error consistency is over the stimuli that each two observers have in common")
    info(f"{result.task}: wrote {', '.join(names)} in {config.output_dir}")


def shape_bias(config: ShapeBiasCommand) -> tuple[EvalResult, CueReport]:
    """Shape bias of the observers and of the models, each with its untrained twin.

    Raises:
        UserError: what reading, loading or deciding refuses.
    """
    rows: dict[str, Row] = {}
    data: dict[str, Any] = {}
    if config.observers is not None:
        observed = read_observers(config.observers)
        data["observers"] = config.observers
        rows |= {label: _row(label, answers, config) for label, answers in observed.items()}
    records: dict[str, dict[str, Any]] = {}
    preprocessing: dict[str, dict[str, Any]] = {}
    if config.models:
        images = open_images(config.stimuli, config.split)
        stimuli = read_stimuli(images)
        data |= {"source": config.stimuli, "fingerprint": images.fingerprint, "stimuli": len(images)}
        train = _train(config)
        ties: Literal["abstain", "last"] = "last" if config.compat == "modelvshuman" else "abstain"
        known: set[str] = set()
        for source in dict.fromkeys(config.models):
            for label, decider in deciders(source, config, train):
                signature = f"{decider.record['weights_hash']} {decider.head.name} {decider.preprocessing}"
                if signature in known:
                    continue  # models of one architecture have one untrained twin
                known.add(signature)
                answers, scores, shown = ask(
                    label, decider, images, stimuli, ties=ties, batch_size=config.batch_size, device=config.device
                )
                if not shown.startswith("as they are"):
                    info(f"note: stimuli are {shown}: {label}")
                told = {"head": decider.head.name, "why": decider.why, "shown": shown, **decider.head.details}
                info(f"{label}: head {decider.head.name}: {decider.why}")
                rows[label] = dataclasses.replace(_row(label, answers, config), details=told, scores=scores)
                records[label], preprocessing[label] = decider.record, dataclasses.asdict(decider.preprocessing)
    answered = {label: row.answers for label, row in rows.items() if row.answers is not None}
    report = CueReport(rows, CATEGORIES, "shape bias", consistency(answered) if len(rows) > 1 else None)
    protocol = "modelvshuman/1" if config.compat == "modelvshuman" else "shape-bias/1"
    return _result(TASK, protocol, report, records, preprocessing, data, config), report


def cue_preference(config: ShapeBiasCommand) -> tuple[EvalResult, CueReport]:
    """Procedural cue preference of the models on the embedded set, each with its untrained twin.

    Raises:
        UserError: what loading or extracting refuses.
    """
    backbones = load_models(
        config.models, arch=config.arch, allow_partial=config.allow_partial, untrained_seed=config.seed
    )
    drawn, pairings = drawings(config, config.seed), random_pairings(config.pairings, config.seed)
    rows: dict[str, Row] = {}
    records: dict[str, dict[str, Any]] = {}
    preprocessing: dict[str, dict[str, Any]] = {}
    known: set[str] = set()
    for label, backbone in backbones.items():
        signature = f"{backbone.weights_hash()} {backbone.preprocessing}"
        if signature in known:
            continue
        known.add(signature)
        records[label], preprocessing[label] = model_record(backbone), dataclasses.asdict(backbone.preprocessing)
        cues, told = measure(
            backbone,
            drawn,
            pairings,
            c=config.c,
            batch_size=config.batch_size,
            device=config.device,
            seed=config.seed,
        )
        untrained = label.endswith("(untrained)") or "@random" in label
        rows[label] = Row("untrained" if untrained else "model", cues, told)
    data = {"source": BUILTIN, "fingerprint": drawn.images.fingerprint, "stimuli": len(drawn.images)}
    report = CueReport(rows, SHAPE_NAMES, "cue preference")
    return _result(CUE_TASK, "procedural-cue-preference/1", report, records, preprocessing, data, config), report


def _row(label: str, answers: Answers, config: ShapeBiasCommand) -> Row:
    try:
        cues = cue_conflict(
            answers.decisions,
            answers.shape,
            answers.texture,
            len(CATEGORIES),
            seed=config.seed,
            all_stimuli=config.compat == "modelvshuman",
        )
    except UserError as error:
        raise UserError(f"{label}: {error}") from error
    return Row(answers.kind, cues, {}, answers)


def _train(config: ShapeBiasCommand) -> LabelledImages | None:
    if config.train_data is None:
        return None
    return labelled_images(open_images(config.train_data, config.train_split, config.label))


def _result(
    task: str,
    protocol: str,
    report: CueReport,
    records: Mapping[str, dict[str, Any]],
    preprocessing: Mapping[str, dict[str, Any]],
    data: Mapping[str, Any],
    config: ShapeBiasCommand,
) -> EvalResult:
    return EvalResult(
        task=task,
        protocol=protocol,
        model=model_records(records) if records else {"source": ", ".join(report.rows)},
        data=data,
        preprocessing=one_or_all(preprocessing) if records else {},
        figures=figures(report),
        details={"compat": config.compat, **details(report)},
        seed=config.seed,
    )
