"""The models of the benchmarks: SmolLM2-135M and a student of 12 of its layers, chosen evenly."""

from typing import Any

import torch

LAYERS = 12


def load_pair(dtype: torch.dtype = torch.bfloat16) -> tuple[Any, Any]:
    """SmolLM2-135M in `dtype` and its student of `LAYERS` layers in float32."""
    from potstill.models import gguf, locate
    from potstill.models.families.registry import export_model, import_model
    from potstill.transforms.apply import apply_transform
    from potstill.transforms.drop_layers import DropLayers, select_evenly

    teacher = gguf.load_model(locate.get_packaged_path(), dtype=torch.float32)
    whole = import_model(teacher)
    student = export_model(apply_transform(DropLayers(select_evenly(len(whole.layers), LAYERS)), whole), teacher)
    return teacher.to(dtype).eval(), student


def count_matrix_weights() -> dict[str, int]:
    """The weights of all matrices that multiply a token, including the head."""
    from potstill.models import gguf, locate
    from potstill.models.families.registry import import_model

    whole = import_model(gguf.load_model(locate.get_packaged_path(), dtype=torch.bfloat16))
    sizes = {name: w.numel() for name, w in whole.state_dict().items() if w.ndim == 2}
    layer = sum(n for name, n in sizes.items() if name.startswith("layers.0."))
    head = sizes["embed.weight"]
    return {"teacher": layer * len(whole.layers) + head, "student": layer * LAYERS + head}
