"""Chat templates that --chat-template knows by name. They write the special tokens of the tokenizer at hand.

`minichat` writes

    <s>SYSTEM</s>[|User|] QUESTION</s>[|Assistant|] ANSWER</s>[|User|] ...

with <s> where the tokenizer has such a token. `phoenix` writes

    SYSTEM\\n\\nHuman: <s>QUESTION</s>Assistant: <s>ANSWER</s>Human: <s> ...

and trains the <s> before an answer too. A tokenizer without <s> writes </s> in its place.

Sources: MiniChat (arXiv:2311.07052), `conversation.py` and `minima/run_building_data_minichat.py` of GeneZC/MiniMA;
Phoenix (arXiv:2304.10453), `llmzoo/datasets/datasets.py` and `llmzoo/utils.py` of FreedomIntelligence/LLMZoo. Each
system sentence is the authors'; a chat's own system prompt takes its place.
"""

MINICHAT_SYSTEM = (
    "‘MiniChat’是一个由‘Beccurio’开发的AI语言模型。下面是人类和MiniChat之间的一段对话。MiniChat的回复应当尽可能详细，"
    "并且以Markdown的形式输出。MiniChat应当拒绝参与违背伦理的讨论。"
)
PHOENIX_SYSTEM = (
    "A chat between a curious human and an artificial intelligence assistant. The assistant gives helpful, detailed, "
    "and polite answers to the human's questions."
)
_START = """\
{%- if not eos_token %}{{ raise_exception('NAME needs a tokenizer with an end-of-text token') }}{% endif %}
{%- set has_system = messages and messages[0]['role'] == 'system' %}
{%- set system = messages[0]['content'] if has_system else "SYSTEM" %}
"""
_OTHER_ROLE = """\
{%- elif not (loop.first and has_system) %}
{{- raise_exception('NAME writes no turn of the role ' + message['role'] + ' here') }}
{%- endif %}
{%- endfor %}
"""
_MINICHAT = (
    _START
    + """\
{{- (bos_token or '') + system + eos_token }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- '[|User|] ' + message['content'] + eos_token }}
{%- elif message['role'] == 'assistant' %}
{{- '[|Assistant|] ' + message['content'] + eos_token }}
"""
    + _OTHER_ROLE
    + """\
{%- if add_generation_prompt %}{{ '[|Assistant|]' }}{% endif %}"""
)
_PHOENIX = (
    _START
    + """\
{%- set begin_token = bos_token or eos_token %}
{{- system + '\\n\\n' }}
{%- for message in messages %}
{%- if message['role'] == 'user' %}
{{- 'Human: ' + begin_token + message['content'] + eos_token }}
{%- elif message['role'] == 'assistant' %}
{{- 'Assistant: ' }}
{%- generation %}{{ begin_token + message['content'] + eos_token }}{% endgeneration %}
"""
    + _OTHER_ROLE
    + """\
{%- if add_generation_prompt %}{{ 'Assistant: ' + begin_token }}{% endif %}"""
)


def _name(template: str, name: str, system: str) -> str:
    return template.replace("NAME", name).replace("SYSTEM", system)


NAMED_TEMPLATES = {
    "minichat": _name(_MINICHAT, "minichat", MINICHAT_SYSTEM),
    "phoenix": _name(_PHOENIX, "phoenix", PHOENIX_SYSTEM),
}
