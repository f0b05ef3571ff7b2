"""Interventions that somebody sent."""

import dataclasses
import re
from typing import Any

from topklm.config import ModelConfig
from topklm.inference.intervention_batch import InterventionBatch
from topklm.inference.interventions import DEFAULT_MODE, Intervention, needs_value
from topklm.server import fields
from topklm.server.errors import ApiError
from topklm.server.limits import Limits
from topklm.web.client import kind_of


def interventions_of(
    config: ModelConfig, content: dict[str, Any], limits: Limits
) -> InterventionBatch | None:
    """{"layer:neuron": value}, or a list of objects as a file of interventions has them; None without any.

    Raises:
        ApiError: For what is none, or is not allowed.
    """
    steer, mode = content.get("steer"), content.get("steer_mode")
    if steer is None:
        if mode is not None:
            raise ApiError(400, "steer_mode goes with steer: leave it out", "steer_mode")
        return None
    if not isinstance(steer, dict | list):
        raise fields.wrong("steer", steer, 'an object {"layer:neuron": value}, or an array of interventions')
    if len(steer) > limits.interventions:
        raise ApiError(
            400, f"steer has {len(steer)} entries: must be at most {limits.interventions}", "steer"
        )
    if isinstance(steer, list) and mode is not None:
        raise ApiError(
            400, "steer_mode goes with an object only: in an array each entry has a mode", "steer_mode"
        )
    if mode is not None and not isinstance(mode, str):
        raise fields.wrong("steer_mode", mode, "a text")
    try:
        entries = steer.items() if isinstance(steer, dict) else steer
        read = _of_pair if isinstance(steer, dict) else _of_entry
        parsed = [read(entry, mode or DEFAULT_MODE) for entry in entries]
        return InterventionBatch.of(config, parsed) if parsed else None
    except (ValueError, OverflowError) as e:
        raise ApiError(400, f"steer: {str(e).removeprefix('steer: ')}", "steer") from e


def _of_pair(pair: tuple[str, Any], mode: str) -> Intervention:
    found = re.fullmatch(r"(\d{1,9}):(\d{1,9})", pair[0])
    if found is None:
        raise ValueError(f"{pair[0][:50]!r} names no neuron: must be LAYER:NEURON, e.g. 3:117")
    return Intervention(int(found[1]), int(found[2]), pair[1], mode)


def _of_entry(entry: Any, _mode: str) -> Intervention:
    names = [field.name for field in dataclasses.fields(Intervention) if field.name != "row"]
    if not isinstance(entry, dict) or not {"layer", "neuron"} <= set(entry):
        raise ValueError("each entry of an array must be an object with layer and neuron")
    if unknown := sorted(set(entry) - set(names)):
        raise ValueError(f"{unknown[0][:50]!r} is none of {', '.join(names)}")
    if "value" not in entry and needs_value(entry.get("mode", DEFAULT_MODE)):
        raise ValueError("value is missing in an entry of the array")
    for name in ("mode", "positions"):
        if name in entry and not isinstance(entry[name], str | list):
            raise ValueError(f"{name}: must not be a JSON {kind_of(entry[name])}")
    positions = entry.get("positions", "all")
    return Intervention(
        **{**entry, "positions": tuple(positions) if isinstance(positions, list) else positions}
    )
