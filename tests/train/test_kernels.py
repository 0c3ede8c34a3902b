"""What oneDNN compiles for the shapes of a step: a kernel for each, so shapes have to come back."""

import subprocess
import sys
from os import environ

import pytest

STEPS = """
import sys
import torch
from transformers import LlamaConfig, LlamaForCausalLM
from potstill.data.packing import collate
from potstill.objectives.logit_distillation import LogitDistillation
from potstill.objectives.dskd import DSKD
from potstill.train.training_module import TrainingModule

torch.manual_seed(0)
config = LlamaConfig(
    vocab_size=256, hidden_size=64, intermediate_size=96, num_hidden_layers=1, num_attention_heads=4,
    num_key_value_heads=2, tie_word_embeddings=True,
)
student, teacher = LlamaForCausalLM(config), LlamaForCausalLM(config).bfloat16()
objective = {"LogitDistillation": LogitDistillation, "DSKD": lambda: DSKD(64, 64)}[sys.argv[1]]()
study = TrainingModule(student, objective, frozen={"teacher": teacher}, compute_dtype=torch.bfloat16)
for lengths in ((20, 30), (11, 13, 24), (33, 5, 6), (40, 17), (3, 58)):
    print("step", flush=True)
    ids = torch.randint(3, 256, (sum(lengths),))
    labels = ids.clone()
    labels[torch.tensor([sum(lengths[:i]) for i in range(len(lengths))])] = -100
    study(**collate([{"input_ids": ids, "labels": labels, "lengths": torch.tensor(lengths)}]))["loss"].backward()
"""


@pytest.mark.slow
@pytest.mark.parametrize("objective", ["LogitDistillation", "DSKD"])
def test_steps_on_documents_of_other_lengths_compile_nothing_that_the_first_step_did_not(objective: str) -> None:
    said = {"ONEDNN_VERBOSE": "profile_create", "OMP_NUM_THREADS": "1"}
    ran = subprocess.run(
        [sys.executable, "-c", STEPS, objective], capture_output=True, text=True, check=True, env=environ | said
    )
    first, *others = (step.count("create:cache_miss") for step in ran.stdout.split("step\n")[1:])
    if not first:
        pytest.skip("nothing here is multiplied by oneDNN")
    assert others == [0, 0, 0, 0]
