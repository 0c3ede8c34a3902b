"""Mixture of depths from end to end: convert, heal with the objective `load`, open, generate."""

import json
from pathlib import Path

import torch

from potstill.core.depth_state import DepthState
from potstill.models.load import load_model
from potstill.objectives.config import ObjectiveConfig
from potstill.stages.convert import ConvertConfig
from potstill.stages.distill.config import DistillConfig
from potstill.stages.distill.run import distill
from potstill.stages.generate_options import AnswerOptions
from potstill.stages.generate_text import generate_text
from potstill.train.config import TrainConfig


def test_a_converted_model_is_healed_measured_and_generates_alike_everywhere(
    teacher: Path, text: Path, tmp_path: Path
) -> None:
    card = ConvertConfig(model=str(teacher), to="depths:layers=0,bias=0.1").run(tmp_path / "gated")
    assert card.details["state_bytes"]["after"] == card.details["state_bytes"]["before"]
    config = DistillConfig(
        teacher=str(teacher),
        student=str(tmp_path / "gated"),
        data=str(text),
        objective=ObjectiveConfig(name="0.7*cross_entropy+0.3*forward_kl+0.5*load:target=0.2"),
        settings=TrainConfig(tokens=1024, context=64, batch_tokens=128, micro_tokens=64, learning_rate=3e-2),
        dtype="float32",
        documents=2,
    )
    distill(config, tmp_path / "healed", show=False)
    metrics = [json.loads(line) for line in (tmp_path / "healed" / "metrics.jsonl").read_text().splitlines()]
    shares = [line["load_share"] for line in metrics if "load_share" in line]
    assert shares[0] == 1.0
    assert min(shares) < 0.9
    loaded = load_model(tmp_path / "healed")
    model, tokenizer = loaded.model.eval(), loaded.tokenizer
    load = model.backbone.blueprint.layers[0].depth.load
    assert 0 <= load < 1
    answer = generate_text(
        str(tmp_path / "healed"), "the still", AnswerOptions(device="cpu", dtype="float32", max_tokens=8, raw=True)
    )
    ids = tokenizer("the still", return_tensors="pt").input_ids
    options = {"max_new_tokens": 8, "do_sample": False}
    written = model.generate(ids, **options)
    assert written.tolist() == model.generate(ids, use_cache=False, **options).tolist()
    assert answer["text"] == tokenizer.decode(written[0, ids.shape[1] :], skip_special_tokens=True)
    states = model.backbone.make_states()
    model.backbone(ids, torch.arange(ids.shape[1])[None], states)
    assert isinstance(states[0], DepthState)
    assert states[0].texts[0].state.get_seq_length() <= ids.shape[1]
