"""Chat templates of the systems that recipes stand for, as Jinja.

Every answer ends with a token that ends a turn in its family, so that the model learns to stop.
"""

from __future__ import annotations

VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)

PLAIN = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}"
    "{% for part in m['content'].split('\ufdd2')[1:] %}\ufdd2{{ part.split('\ufdd3')[0] }}\ufdd3{% endfor %}"
    "{% elif m['role'] == 'assistant' %}{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""The question's media, wherever they stand in it, and the answer: LLaVA's alignment stage (arXiv:2304.08485).

Media stand between two marks while a conversation is rendered (see `avlm.data.text.templates`).
"""

VICUNA = (
    "{{ bos_token }}{% if not messages or messages[0]['role'] != 'system' %}" + VICUNA_SYSTEM + " {% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ m['content'] }} "
    "{% elif m['role'] == 'user' %}USER: {{ m['content'] }} "
    "{% else %}ASSISTANT: {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}ASSISTANT:{% endif %}"
)
"""Vicuna 1.5's, which LLaVA-1.5 was tuned with."""

LLAMA2 = (
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ bos_token }}[INST] <<SYS>>\n{{ m['content'] }}\n<</SYS>>\n\n"
    "{% elif m['role'] == 'user' %}"
    "{% if loop.index0 == 0 or messages[loop.index0 - 1]['role'] != 'system' %}{{ bos_token }}[INST] {% endif %}"
    "{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
)
"""Llama 2's (arXiv:2307.09288, appendix A.3)."""

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}<|start_header_id|>{{ m['role'] }}<|end_header_id|>\n\n"
    "{{ m['content'] }}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}<|start_header_id|>assistant<|end_header_id|>\n\n{% endif %}"
)

NVGPT = (
    "{% if not messages or messages[0]['role'] != 'system' %}<extra_id_0>System\n\n{% endif %}"
    "{% for m in messages %}{% if m['role'] == 'system' %}<extra_id_0>System\n{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}<extra_id_1>User\n{{ m['content'] }}\n"
    "{% else %}<extra_id_1>Assistant\n{{ m['content'] }}\n<extra_id_2>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<extra_id_1>Assistant\n{% endif %}"
)
"""The older NeVA's for NVIDIA's own GPT models: turns begin with <extra_id_1>; an answer ends with <extra_id_2>."""

VITA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'system' %}system:{{ m['content'] }}\n"
    "{% elif m['role'] == 'user' %}user:{{ m['content'] }}\n"
    "{% else %}bot:{{ m['content'] }}{{ eos_token }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}bot:{% endif %}"
)
"""VITA's: turns of ``user`` and ``bot``, an answer ends with the end token."""
