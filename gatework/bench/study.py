"""The definition of a study: read from TOML and flags, completed with defaults, validated before anything trains,
hashed."""

from __future__ import annotations

import dataclasses
import inspect
import json
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from gatework.bench.record import digest
from gatework.bench.settings import choice, count, interval, model_table, parse, settings_text, study_name, variant_table
from gatework.core.errors import GateworkError
from gatework.core.expression import Spec, parse_pattern, parse_value
from gatework.core.registry import check, lookup, suggest

Match = Literal["params", "flops", "seconds", "none"]
MATCHES: tuple[str, ...] = typing.get_args(Match)

#: Keys of a variant that concern training, beside the arguments of the model; each is a part expression.
TRAINING = {"optim": "adamw", "schedule": "cosine", "learner": "backprop"}

#: What a study without further words runs, by kind of backbone.
DEFAULT_VARIANTS: dict[str, dict[str, str]] = {
    "decoder": {
        "gated_attention": "mixer=gated_attention",
        "versatile_ffn": "feedforward=versatile_ffn",
        "moe": "feedforward=moe",
        "gla": "mixer=gla",
        "gateskip": "depth=gateskip",
    },
    "classifier": {"golu": "activation=golu", "xgelu": "activation=xgelu", "xsilu": "activation=xsilu"},
    "click_through": {"optfs": "embedding_gate=optfs(penalty=5e-4, search=0.5), learner=optfs_search"},
    "coordinates": {
        "homogeneous": "experts=4, log2_size=9, coarsest=128",
        "heterogeneous": "experts=4, log2_size=10, coarsest=8",
    },
    "entities": {
        "concept": "level=concept",
        "jepa": "level=jepa",
        "jepa_memory": "level=jepa, memory=1",
    },
    "environments": {
        "gradient": "experts=4, gate=topk(k=1)",
        "mixer": "experts=4, learner=mixer_kmeans(update_gate_every=20)",
    },
    "mixture": {"activation": "gate=activation_dts", "transformed": "gate=transformed", "dselect_k": "gate=dselect_k"},
    "multitask": {
        "dselect_k": "gate=dselect_k(entropy=1e-3)",
        "static": "gate=dselect_k(entropy=3e-3, static=true)",
        "comet": "gate=comet(entropy=1e-3)",
        "permutation": "gate=permutation_search(gate=comet(entropy=1e-3))",
    },
    "pfn": {"gla": "mixer=gla"},
    "ranker": {
        "softmax": "gate=topk(k=8, normalize=none, balance=[])",
        "attention_weighted": "gate=attention_weighted",
        "no_contrast": "gate=attention_weighted(contrast=0.0)",
    },
    "sequence_regressor": {
        "gla": "mixer=gla",
        "gated_deltanet": "mixer=gated_deltanet",
        "linear_self_attention": "mixer=linear_self_attention",
    },
}


@dataclass(frozen=True)
class Variant:
    """One row of the comparison, resolved: every setting it trains with.

    Attributes:
        name: as in the study.
        model: arguments of the backbone that are not the task's.
        optim, schedule, learner: part expressions.
        learning_rates: the range that is searched, (low, high): its own, that of its optimizer where ``lr`` is a
            multiplier there, or the study's.
    """

    name: str
    model: dict[str, Any]
    optim: str
    schedule: str
    learner: str
    learning_rates: tuple[float, float]

    def describe(self) -> dict[str, Any]:
        """A JSON-able copy."""
        return dataclasses.asdict(self) | {"learning_rates": list(self.learning_rates)}


@dataclass(frozen=True)
class Study:
    """Variants x learning rates x seeds on one task under one budget.

    Attributes:
        name: of the study; the same name always means the same configuration.
        task: ``{"name": ..., **options}``.
        baseline: settings of the row that all others are compared with, ``"mixer=attention, feedforward=glu"``.
        variants: what each other row changes of the baseline.
        match: the axis held equal to the baseline's.
        tokens: training budget of a final run (examples, where the task has no tokens).
        tune_tokens: training budget of a tuning trial.
        seeds: number of final runs per variant.
        tune: number of tuning trials per variant.
        learning_rates: range searched, (low, high).
        batch_size: rows per step.
        model: arguments of the backbone that all variants share.
        evaluations: how often a run is validated.
        imports: modules to import first, which register parts of the user's own.
        data_hash: what the task read.
    """

    name: str
    task: dict[str, Any]
    baseline: str
    variants: dict[str, str]
    match: str
    tokens: int
    tune_tokens: int
    seeds: int
    tune: int
    learning_rates: tuple[float, float]
    batch_size: int
    model: dict[str, Any]
    evaluations: int = 6
    imports: tuple[str, ...] = ()
    data_hash: str = ""
    resolved: dict[str, Variant] = field(default_factory=dict, compare=False, repr=False)

    @property
    def hash(self) -> str:
        """Of everything that decides a result: the data (not where they lie) and every variant's settings (not how they
        are written)."""
        content = self.describe() | {"variants": {name: variant.describe() for name, variant in self.resolved.items()}}
        for key in ("name", "baseline", "model", "learning_rates", "imports"):
            content.pop(key)
        content["task"].pop("data", None)
        return digest(content)

    def describe(self) -> dict[str, Any]:
        """A JSON-able copy from which :func:`restore` makes an equal study."""
        plain = {f.name: getattr(self, f.name) for f in dataclasses.fields(self) if f.name != "resolved"}
        copied: dict[str, Any] = json.loads(json.dumps(plain))
        return copied


def restore(description: Mapping[str, Any]) -> Study:
    """The study that :meth:`Study.describe` described, validated again against the parts that exist now."""
    known = {f.name for f in dataclasses.fields(Study)} - {"resolved"}
    values = {name: description[name] for name in known if name in description}
    values["learning_rates"] = tuple(values["learning_rates"])
    values["imports"] = tuple(values.get("imports", ()))
    return resolve(Study(**values))


def define(values: Mapping[str, Any]) -> Study:
    """A complete, validated study from what was given (TOML keys or flags); everything else has its default.

    The data are read and every variant's settings are checked against the parts that exist;
    :mod:`gatework.bench.matching` builds the models.

    Raises:
        GateworkError: with one sentence that says what is wrong and what would be right.
    """
    from gatework.bench.tasks import make_task

    values = {key: value for key, value in values.items() if value is not None}
    task = _task(values)
    load_imports(values.get("imports", ()))
    loaded = make_task(task["name"], **{key: value for key, value in task.items() if key != "name"})
    defaults = loaded.defaults
    variants = variant_table(values.get("variants") or DEFAULT_VARIANTS[loaded.backbone])
    tokens = count("tokens", values.get("tokens", defaults["tokens"]))
    tune_tokens = values.get("tune_tokens", max(1, round(tokens * defaults["tune_tokens"] / defaults["tokens"])))
    study = Study(
        name=study_name("study", values.get("name", task["name"])),
        task=task,
        baseline=settings_text("baseline", values.get("baseline", defaults["baseline"])),
        variants=variants,
        match=choice("match", values.get("match", defaults.get("match", "params")), MATCHES),
        tokens=tokens,
        tune_tokens=count("tune_tokens", tune_tokens),
        seeds=count("seeds", values.get("seeds", 3)),
        tune=count("tune", values.get("tune", 3), least=0),
        learning_rates=interval("learning_rates", values.get("learning_rates", defaults["learning_rates"])),
        batch_size=count("batch_size", values.get("batch_size", defaults["batch_size"])),
        model=dict(defaults["model"]) | model_table(values.get("model", {})),
        evaluations=count("evaluations", values.get("evaluations", 6)),
        imports=tuple(values.get("imports", ())),
        data_hash=loaded.data_hash,
    )
    return resolve(study)


def load_imports(names: Any) -> None:
    """Import the modules that register parts of the user's own; the current folder is searched too."""
    import importlib
    import sys

    if not isinstance(names, list | tuple) or not all(isinstance(name, str) for name in names):
        raise GateworkError(f"imports is a list of module names, not {names!r}")
    if names and "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    for name in names:
        try:
            importlib.import_module(name)
        except ImportError as error:
            raise GateworkError(f"the module {name!r} of imports cannot be imported: {error}") from error


def resolve(study: Study) -> Study:
    """Fill ``study.resolved``: check every setting of every variant."""
    from gatework.bench.tasks import task_class

    backbone = task_class(study.task["name"]).backbone
    settings = {"baseline": ""} | study.variants
    resolved = {name: _resolve(study, backbone, name, text) for name, text in settings.items()}
    return dataclasses.replace(study, resolved=resolved)


def _resolve(study: Study, backbone: str, name: str, text: str) -> Variant:
    base, own = parse(study.baseline), parse(text)
    units = [_multiplier(settings.get("optim", TRAINING["optim"])) for settings in (base, base | own)]
    if units[0] != units[1]:
        base.pop("learning_rates", None)  # A range of rates makes no sense for a multiplier, nor the other way round.
    given = base | own
    shared = {key: value for key, value in study.model.items() if key not in given}
    model, training = {}, dict(TRAINING)
    rates = units[1] or study.learning_rates
    hints = model_arguments(backbone)
    slots = _slots(backbone)
    for key, value in (shared | given).items():
        if key == "learning_rates":
            rates = interval(f"learning_rates of {name}", [parse_value(piece) for piece in str(value).strip("[]()").split(",")])
        elif key in training:
            training[key] = str(check(str(value), key))
        elif key in hints:
            model[key] = _argument(key, value, hints[key], slots.get(key, key))
        else:
            known = [*hints, *TRAINING, "learning_rates"]
            where = "the model" if key in shared else f"variant {name!r}" if name != "baseline" else "the baseline"
            raise GateworkError(f"{where} has no setting {key!r}; {suggest(key, known)}")
    return Variant(name, model, training["optim"], training["schedule"], training["learner"], rates)


def _multiplier(optim: str) -> tuple[float, float] | None:
    """The range to search for an optimizer whose ``lr`` is a multiplier; None for a learning rate."""
    rates: tuple[float, float] | None = getattr(lookup(check(optim, "optim").name, "optim").cls, "learning_rates", None)
    return rates


def model_arguments(backbone: str) -> dict[str, Any]:
    """The arguments of a backbone that a study may set, with their annotations; the task gives the others."""
    from gatework.models import BACKBONES

    cls = BACKBONES[backbone]
    hints = typing.get_type_hints(cls.__init__)
    tied = {"self", *cls.task_arguments}
    return {name: hints.get(name, Any) for name in inspect.signature(cls.__init__).parameters if name not in tied}


def _slots(backbone: str) -> Mapping[str, str]:
    """The arguments of a backbone that take a part and are not called after its slot."""
    from gatework.models import BACKBONES

    return getattr(BACKBONES[backbone], "slots", {})


def _argument(key: str, value: Any, hint: Any, slot: str) -> Any:
    if hint is Any:
        if not isinstance(value, str):
            raise GateworkError(f"{key} takes a part expression such as {key}={_example(slot)}, not {value!r}")
        return ", ".join(str(check(spec, slot)) for spec in parse_pattern(value))
    if isinstance(value, str) and hint is not str:
        value = parse_value(value)
    if isinstance(value, Spec):
        value = str(value)
    options = typing.get_args(hint)
    if typing.get_origin(hint) is Literal:
        return choice(key, value, options)
    wanted = set(options or (hint,))
    whole = isinstance(value, int) and not isinstance(value, bool)
    fits = (
        (whole and wanted & {int, float})
        or (isinstance(value, float) and float in wanted)
        or (isinstance(value, bool) and bool in wanted)
        or (value is None and type(None) in wanted)
    )
    if not fits:
        kind = "true or false" if bool in wanted else "a whole number" if int in wanted else "a number"
        raise GateworkError(f"{key} must be {kind}, not {value!r}")
    return value


def _example(slot: str) -> str:
    from gatework.core.registry import entries

    return next((entry.name for entry in entries(slot)), "NAME")


def _task(values: Mapping[str, Any]) -> dict[str, Any]:
    task = values.get("task", "text")
    task = {"name": task} if isinstance(task, str) else dict(task)
    if "name" not in task:
        raise GateworkError('the task has no name; write name = "text" in [task]')
    if "data" in values:
        if task["name"] != "text":
            raise GateworkError(f"data goes with the task 'text', not with {task['name']!r}")
        task["data"] = str(Path(values["data"]).absolute())
    return task
