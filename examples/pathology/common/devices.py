"""Naming the device to compute on."""

import torch

from examples.pathology.common.errors import UserError


def resolve_device(name: str) -> str:
    """Turn ``auto`` into ``cuda`` or ``cpu`` and check that the device is there.

    Raises:
        UserError: It is no device, or not there.
    """
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UserError(f"`device` must be auto, cpu, cuda or cuda:N, but got {name!r}.") from error
    count = torch.cuda.device_count() if device.type == "cuda" else 1
    if device.type not in ("cpu", "cuda") or (device.index or 0) >= count:
        raise UserError(
            f"`device` must be auto, cpu, cuda or cuda:N and be there, but got {name!r}."
        )
    return name
