"""A session file in place of a recipe."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from onnxslim_ptq.export.weight_files import WeightFiles
    from onnxslim_ptq.recipe import Recipe

__all__ = ["asked_files", "with_session"]


def with_session(given: dict[str, Any]) -> dict[str, Any]:
    """``given`` with the session's recipe and device in place of a session file; everything else as it is.

    Raises RecipeError naming the key that is wrong.
    """
    from onnxslim_ptq.frontends.session.translate import (
        is_session_file,
        read_session,
        recipe_of,
        require_complete,
    )

    if not is_session_file(given["recipe"]):
        return given
    from calib.model import open_model

    session, file = read_session(given["recipe"])
    require_complete(session, bool(given["calib"] or given.get("stats")))
    recipe: Recipe = recipe_of(
        session,
        open_model(given["model"]),
        target=given["target"] or "cpu",
        names=file.names,
        disable_last_linear=file.disable_last_linear,
        quantize_conv=file.quantize_conv,
    )
    device = given["device"] if given["device"] != "cpu" else session.device
    return {**given, "recipe": recipe, "device": device, "save": session.processor_cfg_map.get("save")}


def asked_files(given: dict[str, Any]) -> WeightFiles | None:
    """The files beside the graph: those of the session's ``save``, or of ``--weights``; OUT says where they go."""
    from onnxslim_ptq.export.weight_files import WeightFiles
    from onnxslim_ptq.frontends.session.translate import weight_files

    if given.get("save") is not None:
        return weight_files(given["save"])
    return WeightFiles() if given["weights"] else None
