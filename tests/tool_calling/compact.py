"""A chat format of our own with a line a tool, for runs without a GPU: a fifth of the tokens of Qwen2.5's.

No model was trained on it, so it serves a comparison of before and after, and no use of a model as it comes.
"""

from unsloth_puzzles.tool_calling.formats import ChatFormat
from unsloth_puzzles.tool_calling.replies import read_tagged

TEMPLATE = """\
{%- set first = messages[0].content if messages[0].role == 'system' else '' -%}
{{- '<|im_start|>system\n' + first -}}
{%- for tool in tools or [] -%}
    {{- '\n' + tool.function.name + '(' + tool.function.parameters.properties | join(', ') + ')' -}}
{%- endfor -%}
{{- '<|im_end|>\n' -}}
{%- for message in messages -%}
    {%- if message.role in ('user', 'tool') -%}
        {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
    {%- elif message.role == 'assistant' -%}
        {{- '<|im_start|>assistant\n' + message.content -}}
        {%- for call in message.tool_calls or [] -%}
            {{- '<tool_call>{"name": "' + call.function.name + '", "arguments": ' -}}
            {{- call.function.arguments | tojson + '}</tool_call>' -}}
        {%- endfor -%}
        {{- '<|im_end|>\n' -}}
    {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
{%- endif -%}
"""
COMPACT = ChatFormat("compact", TEMPLATE, "<|im_start|>assistant\n", "<|im_end|>", read_tagged)
