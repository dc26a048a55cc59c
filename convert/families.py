"""Which family a checkpoint belongs to."""

from ..errors import InputError
from .checkpoint import Checkpoint
from .coremltower import add_tower, is_app
from .family import Family
from .fastvlm import FASTVLM, describe_unreadable, is_fastvlm
from .openvla import OPENVLA, gather, is_prismatic

FAMILIES = (FASTVLM, OPENVLA)


def identify(
    checkpoint: Checkpoint, adapter: str = "auto"
) -> tuple[Family, Checkpoint]:
    """The family of a checkpoint, and the checkpoint with all its files.

    adapter: what becomes of an OpenVLA-OFT policy's `lora_adapter/`.
    Raises `InputError` that says what was found and what can be read.
    """
    if is_app(checkpoint):
        checkpoint = add_tower(checkpoint)
    if is_fastvlm(checkpoint.tensors):
        if adapter != "auto" or checkpoint.base:
            raise InputError(
                f"{checkpoint.folder} is a FastVLM; leave out --lora-adapter and "
                "--base-model, which are said of OpenVLA-OFT policies"
            )
        return FASTVLM, checkpoint
    if is_prismatic(checkpoint.tensors):
        return OPENVLA, gather(checkpoint, adapter)
    found = describe_unreadable(checkpoint) or (
        f"a checkpoint of model type {checkpoint.config.get('model_type')!r} without a "
        "vision tower that is known here"
    )
    reads = "; ".join(family.reads for family in FAMILIES)
    raise InputError(f"{checkpoint.folder} is {found}; this reads {reads}")
