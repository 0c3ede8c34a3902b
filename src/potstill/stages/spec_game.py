"""Spec-game: draft sizes against draft lengths for one target, on prompts of yours and on this machine.

    potstill run spec-game --teacher MODEL --data prompts.jsonl --out made

Acceptance, costs and speed-ups are those of `potstill advise`. This stage chooses the drafts, and compares the
speed-ups with the formula. A run that was stopped starts again.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from potstill.core.atomic_files import atomic_folder, write_text
from potstill.core.card import Card
from potstill.core.errors import UsageError
from potstill.core.measure import Measure
from potstill.core.measure_table import MEASURES
from potstill.core.options import ALLOW_PICKLE, DEVICE, DTYPE, SEED, TRUST_REMOTE_CODE
from potstill.evaluate.charts.speed_up import render_html
from potstill.evaluate.spec_game import Game, read_game
from potstill.models.spec import read_model_spec
from potstill.stages.advise import AdviseConfig
from potstill.stages.console import explain_write_errors, get_command, print_note
from potstill.stages.option_checks import check_single_process
from potstill.stages.options import COLUMNS, DATA, TextOptions
from potstill.stages.preflight import StageInputs
from potstill.stages.public_names import get_public_name
from potstill.stages.run_folder import reserve_output
from potstill.stages.stage import to_plain_dict
from potstill.stages.text_options import get_text_options

PAGE_FILE = "spec-game.html"


@dataclass(frozen=True, kw_only=True)
class SpecGameConfig(TextOptions):
    """Tries each of `drafts`, as `--draft` names them, with each of the lengths `draft_length` for `model`.

    Without `drafts` they are the first layers of the model itself, in the shares `exits` of its depth. `documents` is
    the number of prompts, and an answer has at most `max_tokens` tokens. With `check` the speed-ups are measured, too.

    Raises: UsageError for an option out of its range.
    """

    kind: ClassVar[str] = "spec-game"

    model: str
    data: str | tuple[str, ...] = DATA.default
    columns: str = COLUMNS.default
    drafts: tuple[str, ...] = ()
    exits: tuple[float, ...] = (0.1, 0.25, 0.5, 0.75)
    draft_length: str = "1,2,3,4,5,6,7"
    documents: int = 4
    max_tokens: int = 48
    check: bool = True
    seed: int = SEED.default
    device: str = DEVICE.default
    dtype: str = DTYPE.default
    allow_pickle: bool = ALLOW_PICKLE.default
    trust_remote_code: bool = TRUST_REMOTE_CODE.default

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.drafts and not self.exits:
            raise UsageError("there is no draft; give drafts, or exits as shares of the depth")
        if not all(0 < share < 1 for share in self.exits):
            raise UsageError(f"exits are {self.exits}; each is a share of the depth, above 0 and below 1")
        self.make_advise_config(self.drafts or ("exit:1",))

    def to_dict(self) -> dict[str, Any]:
        """The stage and its options as plain data."""
        return to_plain_dict(self)

    @property
    def inputs(self) -> StageInputs:
        """What the stage reads."""
        return self.make_advise_config(self.drafts or ("exit:1",)).inputs

    def run(self, out: Path, *, overwrite: bool = False, resume: bool = False) -> Card:
        """Tries all drafts, and writes the card, with a page that has the chart and the table, to `out`.

        Raises: UsageError, NotFound, DataError, UnsupportedModel, OutputExists before anything is written.
        """
        check_single_process()
        with reserve_output(out, self.inputs, overwrite=overwrite):
            advice = self.make_advise_config(self.drafts or self.list_exits()).run()
            game = read_game(advice)
            card = self.make_card(advice, game)
            with explain_write_errors(out), atomic_folder(out, overwrite=overwrite) as folder:
                card.write(folder)
                title = f"Drafts of several sizes for {get_public_name(self.model)}"
                write_text(folder / PAGE_FILE, render_html(advice["settings"], title=title, advice=game.describe()))
        print_note(game.describe())
        return card

    def list_exits(self) -> tuple[str, ...]:
        """`exit:LAYERS` for each share of the depth.

        Raises: UsageError for a model of one layer; UnsupportedModel without a known number of layers.
        """
        spec = read_model_spec(self.model, allow_pickle=self.allow_pickle, trust_remote_code=self.trust_remote_code)
        num_layers = len(spec.blueprint.layers)
        if num_layers < 2:
            raise UsageError(f"{self.model} has one layer, so it has no exit before its end; give drafts")
        exits = {min(max(1, round(share * num_layers)), num_layers - 1) for share in self.exits}
        return tuple(f"exit:{number}" for number in sorted(exits))

    def make_advise_config(self, drafts: tuple[str, ...]) -> AdviseConfig:
        """What `potstill advise` would be asked."""
        return AdviseConfig(
            **get_text_options(self),
            model=self.model,
            data=self.data,
            columns=self.columns,
            draft=drafts,
            draft_length=self.draft_length,
            prompts=self.documents,
            max_tokens=self.max_tokens,
            check=self.check,
            runs=1,
            seed=self.seed,
            device=self.device,
            dtype=self.dtype,
            allow_pickle=self.allow_pickle,
            trust_remote_code=self.trust_remote_code,
        )

    def make_card(self, advice: Mapping[str, Any], game: Game) -> Card:
        """The card: each draft at its best length, the game, and what it rests on."""
        names = ("data", "conditions", "plain_seconds", "verification_cost", "settings", "advice")
        return Card(
            stage=self.to_dict(),
            seed=self.seed,
            data=advice["data"],
            measures={draft.name: measure_draft(advice, draft.name, draft.best_length) for draft in game.drafts},
            details={**game.to_dict(), **{name: advice[name] for name in names}},
            command=get_command(),
        )


def measure_draft(advice: Mapping[str, Any], draft: str, draft_length: int) -> list[Measure]:
    """`acceptance` of the first draft token, `tokens_per_pass`, and the speed-ups of a draft with this length."""
    row = next(row for row in advice["settings"] if (row["draft"], row["draft_length"]) == (draft, draft_length))
    prompts, note = advice["data"]["prompts"], f"drafts of {draft_length} tokens"
    values = {
        "acceptance": row["acceptance"][0] if row["acceptance"] else 0.0,
        "tokens_per_pass": row["tokens_per_pass"],
        "predicted_speed_up": row["predicted"],
        "speed_up": row["measured"],
    }
    return [MEASURES[name].build(value, prompts, note=note) for name, value in values.items() if value is not None]
