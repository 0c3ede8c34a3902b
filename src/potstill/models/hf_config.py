"""A blueprint as a Hugging Face config, for networks that no stock family expresses."""

from typing import Any

from transformers import PreTrainedConfig

import potstill.layers  # noqa: F401  registers the built-in kinds of parts
from potstill.core.blueprint import Blueprint
from potstill.core.errors import ArtifactError

SPECIAL_TOKEN_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class PotstillConfig(PreTrainedConfig):
    """`blueprint` is the architecture as plain data; properties compute the attributes that Hugging Face reads.

    Raises:
        ArtifactError: there is no blueprint.
    """

    model_type = "potstill"

    def __init__(self, blueprint: dict[str, Any] | None = None, **kwargs: Any) -> None:
        if blueprint is None:
            raise ArtifactError("this potstill config has no blueprint; use PotstillConfig.from_blueprint")
        self.blueprint = blueprint
        self.bos_token_id: int | None = None
        self.eos_token_id: int | list[int] | None = None
        self.pad_token_id: int | None = None
        super().__init__(**kwargs)  # whatever else a config.json holds, as every Hugging Face config takes it

    @classmethod
    def from_blueprint(cls, blueprint: Blueprint) -> "PotstillConfig":
        """The config of `blueprint`, with the token ids among its extras."""
        data = blueprint.to_dict()
        return cls(blueprint=data, **{name: data["extras"].get(name) for name in SPECIAL_TOKEN_IDS})

    def to_blueprint(self) -> Blueprint:
        """The blueprint.

        Raises:
            ArtifactError: a key is unknown, or the kind of a part is not registered.
        """
        return Blueprint.from_dict(self.blueprint)

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding."""
        return self.to_blueprint().vocabulary

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.to_blueprint().hidden

    @property
    def num_hidden_layers(self) -> int:
        """Number of layers."""
        return len(self.to_blueprint().layers)

    @property
    def max_position_embeddings(self) -> int:
        """Number of positions it was trained for."""
        return self.to_blueprint().context

    @property
    def tie_word_embeddings(self) -> bool:
        """Whether the embedding is the head."""
        return self.to_blueprint().tied

    @property
    def final_logit_softcapping(self) -> float | None:
        """The soft-cap of the logits."""
        return self.to_blueprint().logit_softcap

    @property
    def initializer_range(self) -> float:
        """Standard deviation of fresh weights."""
        return float(self.to_blueprint().get_extra("initializer_range", 0.02))
