"""M-Thinker: a model that thinks and answers in the language of the question, by fine-tuning and two rounds of GRPO.

    potstill run m-thinker --teacher MODEL --data cold.jsonl --questions questions.jsonl --out thinker

`--data` are questions with thinking and answers in the language of each. `--questions` are others, with `answer`,
`language`, and their English text in the column `english`. Each round draws eight samples to each question that no
earlier stage has used, and keeps those that the model solves now and then. Then it writes English solutions, and trains
on a reward for consistent language, the right answer, and thinking that follows the English solution.

`--judge http://HOST:PORT/v1#MODEL` compares the thinking, as DeepSeek-V3 does in the paper. Without it, the share of
the solution's numbers that the thinking has is the score.

Source: Zhang et al., "Think Natively: Unlocking Multilingual Reasoning with Consistency-Enhanced Reinforcement
Learning" (arXiv:2510.07300), and its released code (verl).
Departs from the code: answers have at most 768 tokens, and are compared by value; a selected sample may lack the
form that the reward asks for (`</think>` once, in more than 1,000 characters).
Cost and measures: we have run only the tiny form.
"""

from dataclasses import replace

from potstill.objectives.config import ObjectiveConfig
from potstill.objectives.cross_entropy import CROSS_ENTROPY
from potstill.recipes.registry import REQUIRED_DATA, REQUIRED_QUESTIONS, Recipe
from potstill.stages.align.config import AlignConfig
from potstill.stages.align.options import AlignTrainConfig
from potstill.stages.candidates.config import CandidatesConfig
from potstill.stages.candidates.options import MIXED, SOLVE
from potstill.stages.distill.config import DistillConfig
from potstill.stages.sequence import Stage, name_stage_folder
from potstill.train.config import TrainConfig

BIBTEX = """@article{zhang2025think,
  title={Think Natively: Unlocking Multilingual Reasoning with Consistency-Enhanced Reinforcement Learning},
  author={Zhang, Xue and Liang, Yunlong and Meng, Fandong and Zhang, Songming and Huang, Kaiyu and Chen, Yufeng and
    Xu, Jinan and Zhou, Jie},
  journal={arXiv preprint arXiv:2510.07300},
  year={2025}
}"""
TOKENS = 768  # of an answer
COLD_START, FIRST_QUESTIONS, FIRST_SOLUTIONS, FIRST_POLICY, SECOND_QUESTIONS, SECOND_SOLUTIONS = map(
    name_stage_folder, range(1, 7)
)
ORIGINS = {
    "learning_rate": "1e-6 for the cold start, 5e-6 for GRPO with 1.5B parameters, the code; 3e-6 with 7B",
    "epochs": "1, and at most 15 of GRPO, the code, which picks a checkpoint by MMATH",
    "select, reward": "some but not all of 8 samples right and consistent; then the m_thinker reward, the code",
    "samples": "8, and for solutions 1, 8, 16 and 32 until one is right, the paper",
    "temperature, top_p": "0.9 and 0.95 to select, the paper; GRPO draws at 0.9 from the whole distribution",
    "per_language": "3,000, the paper, topped up by `tier`",
    "exclude": "the questions of the cold start and of the first round, the paper",
    "objective": "GRPO, loss by tokens, clip 0.2, no KL, the code; one update for each step",
    "prompts_per_step": "512, the code; all prompts where there are fewer, ours",
    "max_tokens": "768, ours; the code has 14,336 in the first round and 21,952 in the second",
    "context, batch_tokens": "ours: 8 answers and a prompt of 2,040 tokens, the code has 2,048; the cold start "
    "has 256 chats of up to 16,384 tokens",
    "warmup, final_rate, weight_decay, clip": "ours, the defaults of distill and align",
}


def build_stages() -> tuple[Stage, ...]:
    """The cold start, and twice: questions, solutions and GRPO."""
    cold_start = DistillConfig(
        teacher="smollm2",
        student="smollm2",
        data=REQUIRED_DATA,
        objective=ObjectiveConfig(name=CROSS_ENTROPY),
        settings=TrainConfig(epochs=1.0, learning_rate=1e-6, context=2048, batch_tokens=16384),
    )
    questions = CandidatesConfig(
        model=COLD_START,
        data=REQUIRED_QUESTIONS,
        select=MIXED,
        reward="accuracy+language",
        samples=8,
        temperature=0.9,
        top_p=0.95,
        max_tokens=TOKENS,
        per_language=3000,
        exclude=(REQUIRED_DATA,),
    )
    solutions = replace(questions, data=FIRST_QUESTIONS, select=SOLVE, samples=32, per_language=0, exclude=())
    policy = AlignConfig(
        model=COLD_START,
        data=FIRST_SOLUTIONS,
        objective="grpo:temperature=0.9,normalization=tokens",
        reward="m_thinker",
        samples=8,
        max_tokens=TOKENS,
        settings=AlignTrainConfig(epochs=15.0, learning_rate=5e-6, context=8192, prompts_per_step=512),
    )
    return (
        cold_start,
        questions,
        solutions,
        policy,
        replace(questions, model=FIRST_POLICY, exclude=(REQUIRED_DATA, FIRST_QUESTIONS)),
        replace(solutions, model=FIRST_POLICY, data=SECOND_QUESTIONS),
        replace(policy, model=FIRST_POLICY, data=SECOND_SOLUTIONS),
    )


def build_recipe() -> Recipe:
    """SmolLM2-135M after two rounds."""
    return Recipe(
        name="m-thinker",
        summary="a cold start, then two rounds of GRPO with a reward for thinking in the language of the question",
        source="arXiv:2510.07300",
        bibtex=BIBTEX,
        stages=build_stages(),
        origins=ORIGINS,
    )
