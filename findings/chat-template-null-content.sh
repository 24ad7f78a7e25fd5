#!/usr/bin/env bash
# A chat message whose content is null reaches the template without a content at all.
#
# One would guess: `apply_chat_template` renders the template with the messages that it is given. An assistant message that
# only calls a tool has `"content": null` in the format that hosted models answer with and that data sets keep, and
# templates guard it with `{% if message.content is not none %}`.
# What happens: transformers 5.23 removes keys whose value is None before it renders. `is none` is then false, and so the
# guard lets the message through with an undefined content, which prints as nothing: the rendering has an empty turn that
# the template's author left out. jinja2 alone, given the same messages, leaves it out.
# Why it matters: training data that is rendered by a copy of the template (in another library, or in a server) has other
# tokens than the same data rendered through transformers, and nothing says so.
# Versions: transformers 5.23.0, tokenizers 0.23.3, jinja2 3.1.6; Python 3.11. No torch is needed.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
python3 -m venv "$folder/venv"
"$folder/venv/bin/pip" install --quiet --disable-pip-version-check transformers==5.23.0 tokenizers==0.23.3 jinja2==3.1.6 \
    2>"$folder/pip.log" || { cat "$folder/pip.log"; exit 1; }
TRANSFORMERS_VERBOSITY=error "$folder/venv/bin/python" - <<'PYTHON'
import sys
from importlib.metadata import version

from jinja2 import Environment
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

TEMPLATE = "{% for m in messages %}{% if m.content is not none %}[{{ m.role }}]{{ m.content }}{% endif %}{% endfor %}"
MESSAGES = [
    {"role": "user", "content": "What time is it?"},
    {"role": "assistant", "content": None},
    {"role": "tool", "content": "noon"},
]
tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel({"x": 0}, unk_token="x")))
through_transformers = tokenizer.apply_chat_template(MESSAGES, chat_template=TEMPLATE, tokenize=False)
through_jinja = Environment().from_string(TEMPLATE).render(messages=MESSAGES)
print(*(f"{name} {version(name)}" for name in ("transformers", "tokenizers", "jinja2")))
print("jinja2 alone:       ", through_jinja)
print("apply_chat_template:", through_transformers)
expected = ("[user]What time is it?[tool]noon", "[user]What time is it?[assistant][tool]noon")
sys.exit((through_jinja, through_transformers) != expected)
PYTHON
