"""Loads a model by its name, one size of it, a device and a data type, as a caller states them."""

from pathlib import Path

from potstill.core.device import resolve_device, resolve_dtype
from potstill.core.elastic import name_size
from potstill.models.load import LoadedModel, load_model


def load_size(
    model: str | Path,
    size: float | None,
    *,
    device: str,
    dtype: str,
    allow_pickle: bool = False,
    trust_remote_code: bool = False,
) -> LoadedModel:
    """The model, or with `size` that size of an elastic model, on the device and in the data type of these names.

    Raises: NotFound, UnsafeModel, ArtifactError, UnsupportedModel; UsageError for a size that the model has not.
    """
    place = resolve_device(device)
    return load_model(
        model if size is None else name_size(str(model), size),
        device=place,
        dtype=resolve_dtype(dtype, device_type=str(place)),
        allow_pickle=allow_pickle,
        trust_remote_code=trust_remote_code,
    )
