"""Templates: the ways to write a conversation down that a tokenizer without a chat template of its own can be given.

Each is a Jinja source as Hugging Face's tokenizers run it: it writes BOS once, an EOS after every reply, and the words
that ask for a reply are those that a stored reply stands behind, so that training and generation read the same ids.
"""

from __future__ import annotations

from pathlib import Path

# A reply starts on its own line, so no merge crosses its border.
PLAIN_TEMPLATE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ message['role'] | capitalize }}:{{ '\\n' }}{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)

# What the Instruction and Input headings share. Messages that were made from two columns carry both beside `content`.
_INSTRUCTION = (
    "{{ '### Instruction:\\n' + (message['instruction'] or message['content']) + '\\n\\n' }}"
    "{% if message['input'] %}{{ '### Input:\\n' + message['input'] + '\\n\\n' }}{% endif %}"
)

# Stanford Alpaca's two texts, byte for byte; an empty input chooses the shorter. A system message stands in for the
# preamble.
ALPACA = (
    "{{ bos_token or '' }}"
    "{% if messages[0]['role'] != 'system' %}"
    "{{ 'Below is an instruction that describes a task' }}"
    "{% if messages[0]['input'] %}{{ ', paired with an input that provides further context' }}{% endif %}"
    "{{ '. Write a response that appropriately completes the request.\\n\\n' }}"
    "{% endif %}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:' + message['content'] + eos_token + '\\n\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}" + _INSTRUCTION + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:' }}{% endif %}"
)

# The same headings without a preamble, and every text on a line of its own.
SHORT = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ '### Response:\\n' + message['content'] + eos_token + '\\n\\n' }}"
    "{% elif message['role'] == 'system' %}{{ message['content'] + '\\n\\n' }}"
    "{% else %}" + _INSTRUCTION + "{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '### Response:\\n' }}{% endif %}"
)

ROLES = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '[' + message['role'] | upper + ']' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '[ASSISTANT]' }}{% endif %}"
)

TAGS = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '<|' + message['role'] + '|>\\n' + message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{{ '\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)

# The dialogues of HH-RLHF (Bai et al. 2022), which their reader takes apart: special tokens aside, byte for byte.
DIALOGUE = (
    "{{ bos_token or '' }}"
    "{% for message in messages %}"
    "{{ '\\n\\n' + {'user': 'Human', 'assistant': 'Assistant'}.get(message['role'], 'System') + ': ' }}"
    "{{ message['content'] }}"
    "{% if message['role'] == 'assistant' %}{{ eos_token }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '\\n\\nAssistant:' }}{% endif %}"
)

TEMPLATES = {
    "plain": PLAIN_TEMPLATE,
    "alpaca": ALPACA,
    "short": SHORT,
    "roles": ROLES,
    "tags": TAGS,
    "dialogue": DIALOGUE,
}


def named(name: str) -> str:
    """The Jinja source of a template: one of TEMPLATES, or what stands in a .jinja file. Raises ValueError."""
    if name in TEMPLATES:
        return TEMPLATES[name]
    if not name.endswith(".jinja") or not Path(name).is_file():
        raise ValueError(f"template: expected one of {', '.join(TEMPLATES)}, or a .jinja file, got {name!r}")
    return Path(name).read_text(encoding="utf-8")
