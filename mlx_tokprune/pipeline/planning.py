"""The plan of pruners for one model, checked against what the model provides."""

from ..errors import InputError
from ..models.protocol import VisionModel
from ..pruners import Plan, Pruner, Pruners, as_plan, get_method, list_pruners
from ..pruners.scorers import check_fits


def given_or_carried(model: VisionModel, pruners: Pruners) -> Plan:
    """Return these pruners as a plan, or those of the model's checkpoint for `None`."""
    return as_plan(model.carried if pruners is None else pruners)


def plan_for(model: VisionModel, pruners: Pruners) -> Plan:
    """Return one pruner, several or none as a plan for a model, ordered by place.

    `None` stands for the pruners of the model's checkpoint. Raises `InputError` if the
    model lacks what a pruner needs at its place, or if a method with its own count is
    combined with a pruner inside the language model.
    """
    plan = as_plan(given_or_carried(model, pruners), len(model.decoder.layers))
    for pruner in plan:
        provided = model.provides.get(pruner.place, ())
        missing = [name for name in pruner.needs if name not in provided]
        if missing:
            fitting = [name for name in list_pruners() if _fits(name, provided)]
            raise InputError(
                f"method {pruner.method!r} needs {', '.join(missing)}, which this "
                f"model does not have at {pruner.at!r}; choose another, such as "
                f"{fitting[0]!r}, or another place"
            )
        if pruner.scorer is not None:
            name = pruner.folder or pruner.method
            check_fits(pruner.scorer, model, pruner.place, name)
    layers = [pruner for pruner in plan if pruner.place == "layer"]
    for pruner in layers:
        _check_layer(pruner, len(model.decoder.layers))
    own = [pruner for pruner in plan if pruner.has_own_count]
    if layers and own:
        raise InputError(
            f"method {own[0].method!r} decides itself how many visual tokens to keep, "
            "which cannot be done for a pruner inside the language model, nor before "
            "one; give it a budget, or leave out the place"
        )
    return plan


def _check_layer(pruner: Pruner, layers: int) -> None:
    if not isinstance(pruner.at, int) or pruner.at >= layers:
        raise InputError(
            f"cannot prune after layer {pruner.at} of {layers}; expected 1 to "
            f"{layers - 1}"
        )


def _fits(method: str, provided: tuple[str, ...]) -> bool:
    needs = get_method(method).needs
    return method != "none" and all(name in provided for name in needs)
