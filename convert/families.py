"""Which family a checkpoint belongs to."""

from ..errors import InputError
from .checkpoint import Checkpoint
from .coremltower import add_tower, is_app
from .family import Family
from .fastvlm import FASTVLM, describe_unreadable, is_fastvlm
from .openvla import OPENVLA, gather, is_prismatic
from .pi0fast import PI0FAST, family_of, is_pi0fast
from .resnetvlm import RESNET_VLM, is_resnet_vlm

FAMILIES = (FASTVLM, OPENVLA, PI0FAST, RESNET_VLM)


def identify(
    checkpoint: Checkpoint, adapter: str = "auto"
) -> tuple[Family, Checkpoint]:
    """The family of a checkpoint, and the checkpoint with all its files.

    adapter: what becomes of an OpenVLA-OFT policy's `lora_adapter/`.
    Raises `InputError` that says what was found and what can be read.
    """
    if is_app(checkpoint):
        checkpoint = add_tower(checkpoint)
    others = (
        (is_fastvlm, "FastVLM"),
        (is_pi0fast, "pi0-FAST policy"),
        (is_resnet_vlm, "ResNet-VLM"),
    )
    for is_one, name in others:
        if is_one(checkpoint.tensors) and (adapter != "auto" or checkpoint.base):
            raise InputError(
                f"{checkpoint.folder} is a {name}; leave out --lora-adapter and "
                "--base-model, which are said of OpenVLA-OFT policies"
            )
    if is_fastvlm(checkpoint.tensors):
        return FASTVLM, checkpoint
    if is_pi0fast(checkpoint.tensors):
        return family_of(checkpoint), checkpoint
    if is_resnet_vlm(checkpoint.tensors):
        return RESNET_VLM, checkpoint
    if is_prismatic(checkpoint.tensors):
        return OPENVLA, gather(checkpoint, adapter)
    found = describe_unreadable(checkpoint) or (
        f"a checkpoint of model type {checkpoint.config.get('model_type')!r} without a "
        "vision tower that is known here"
    )
    reads = "; ".join(family.reads for family in FAMILIES)
    raise InputError(f"{checkpoint.folder} is {found}; this reads {reads}")
