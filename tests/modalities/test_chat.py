"""Chat templates: equal to transformers' on what real templates do, and bounded whatever a stranger's does."""

import json
import subprocess
import sys

import pytest
import tokenizers

from omnimix.errors import ConfigError
from omnimix.modalities.text import meter
from omnimix.modalities.text.chat import TURN
from omnimix.modalities.text.tokenizer import END, BPETokenizer, ByteTokenizer, train_bpe

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Zürich <3>", "days": 2}}}
TOOLS = [
    {
        "type": "function",
        "function": {
            "name": "weather",
            "description": "It's the weather & more",
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
]
DOCUMENTS = [{"title": "One", "text": "first"}, {"title": "Two", "text": "second"}]
MESSAGES = [
    {"role": "system", "content": "  Be brief. "},
    {"role": "user", "content": "Hi <b>'you'</b>"},
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "name": "weather", "content": '{"sky": "blue"}', "tool_call_id": None},
    {"role": "assistant", "content": "<think>why</think>\nFine.", "reasoning_content": "why"},
    {"role": "user", "content": [{"type": "text", "text": "See"}, {"type": "image", "url": "x.png"}]},
]
FEATURES = {
    "generation": (
        "{% for m in messages %}{% if m.role == 'assistant' %}{% generation %}{{ m.content or 'call' }}"
        "{% endgeneration %}{% else %}{{ m.role }}{% endif %}\n{% endfor %}"
    ),
    "generation, trimmed": (
        "{%- for m in messages -%}  {%- generation -%}  [{{ m.role }}]  {%- endgeneration -%}  {% endfor -%}"
    ),
    "tojson": "{{ tools | tojson }}|{{ messages | tojson(indent=2) }}|{{ tools[0] | tojson(separators=(',', ':')) }}",
    "tojson, sorted": "{{ tools | tojson(sort_keys=true, ensure_ascii=true) }}{{ tools | tojson(indent='\t') }}",
    "no tools": "{{ tools is none }}{{ documents is none }}{% if tools %}T{% endif %}{{ tools is defined }}",
    "documents": "{% for d in documents or [] %}{{ loop.index }}. {{ d['title'] }}: {{ d.text }}\n{% endfor %}",
    "tool calls": (
        "{% for m in messages if m.tool_calls %}{% for c in m.tool_calls %}{% set c = c.function or c %}"
        "{{ c.name }}({% for k, v in c.arguments.items() %}{{ k }}={{ v | string }}{{ ', ' if not loop.last }}"
        "{% endfor %}){% endfor %}{% if m.content is defined %}!{% endif %}{% endfor %}"
    ),
    "parts": (
        "{% for m in messages %}{% if m.content is string %}{{ m.content | trim }}{% elif m.content is iterable %}"
        "{% for p in m.content %}{% if p.type == 'text' %}{{ p.text }}{% else %}<|{{ p['type'] }}|>{% endif %}"
        "{% endfor %}{% endif %}{{ eos_token }}{% endfor %}"
    ),
    "own bos": "{{ bos_token }}{% for m in messages %}{{ '[' ~ m.role ~ ']' }}{% endfor %}",
    "namespace": (
        "{% set ns = namespace(last=-1, seen=false, text='') %}{% for m in messages[::-1] %}"
        "{% set i = (messages | length - 1) - loop.index0 %}{% if not ns.seen and m.role == 'user' %}"
        "{% set ns.seen = true %}{% set ns.last = i %}{% endif %}{% endfor %}{{ ns.last }}"
        "{% for m in messages %}{% set ns.text = ns.text + m.role[0:2] %}{% endfor %}{{ ns.text }}"
    ),
    "thinking": (
        "{% for m in messages if m.role == 'assistant' and m.content %}"
        "{{ m.content.split('</think>')[-1].lstrip('\\n') }}|{{ m.content.split('<think>')[1].rstrip() }}|"
        "{{ m.reasoning_content }}|{{ m.thinking }}{% endfor %}{{ enable_thinking }}"
    ),
    "macros": (
        "{% macro show(m, prefix='') -%}{{ prefix }}{{ m.role | upper }}{% if caller %}{{ caller() }}{% endif %}"
        "{%- endmacro %}{{ show(messages[0]) }}{% call show(messages[1], prefix='>') %}!{% endcall %}"
    ),
    "loops": (
        "{% for m in messages %}{% if loop.index0 == 1 %}{% continue %}{% elif loop.index0 == 3 %}{% break %}"
        "{% endif %}{{ loop.cycle('a', 'b') }}{{ loop.previtem.role if not loop.first }}{% else %}none{% endfor %}"
    ),
    "system": (
        "{% if messages[0]['role'] == 'system' %}{% set system = messages[0]['content'] | trim %}"
        "{% set rest = messages[1:] %}{% endif %}{{ system }}{{ rest | length }}{{ rest[-1].content[0]['text'] }}"
    ),
    "filters": (
        "{{ messages | map(attribute='role') | unique | join(', ') }}{{ messages | selectattr('role', 'eq', 'user') "
        "| list | length }}{{ [3, 1, 2] | sort | join('-') }}{{ 'a\nb' | indent(4, true) }}{{ 3.7 | round | int }}"
        "{{ [1, 2] | sum }}{{ messages | rejectattr('content', 'defined') | map(attribute='role') | list }}"
        "{{ 'x' | default('y') }}{{ missing | default('z') }}{{ 'ab' | replace('a', 'bb') }}{{ {'b': 1, 'a': 2} "
        "| dictsort }}{{ {'a': [1, none, true]} | tojson }}{{ '%s=%05.1f' | format('v', 2) }}"
        "{{ {'k': 1} | items | list }}"
    ),
    "arithmetic": (
        "{{ 7 // 2 }}{{ 7 % 4 }}{{ 2 ** 10 }}{{ 'ab' * 2 }}{{ [1] + [2] }}{{ '%d.' % 5 }}{{ 1.5 * 2 }}{{ -3 }}"
    ),
    "strings": (
        "{{ 'a,b'.split(',') }}{{ 'x'.join(['1', '2']) }}{{ '{}-{a}'.format(1, a='2') }}"
        "{{ 'Ab'.lower().startswith('a') }}"
        "{{ 'a b'.replace(' ', '_').title() }}{{ 'ab'.center(6) }}{{ '%(k)s' % {'k': 'v'} }}"
        "{{ 'abc'[1:] }}{{ 'a\tb'.expandtabs(4) }}"
    ),
    "white space": "{%- if true %}\n    yes\n    {%- endif %}\n  {# note #}\n  {% set x %}in\n{% endset %}[{{ x }}]\n",
    "tests": (
        "{{ messages is sequence }}{{ none is none }}{{ 1 is number }}{{ {} is mapping }}{{ 'a' in 'cat' }}"
        "{{ messages[0] is mapping and 'role' in messages[0] }}{{ 1 < 2 <= 2 }}{{ 'a' not in ['b'] }}"
    ),
    "prompt": "{{ add_generation_prompt }}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "dates": "{{ strftime_now('%Y') | length }}{% if strftime_now is defined %}{{ dict(a=1) }}{% endif %}",
    "range": "{% for i in range(3) %}{{ i }}{% endfor %}{{ range(2, 9, 3) | list }}{{ namespace(a=1).a }}",
}


def theirs(tokenizer):
    transformers = pytest.importorskip("transformers")
    inner = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.state()["tokenizer"]))
    return transformers.PreTrainedTokenizerFast(tokenizer_object=inner, **tokenizer.variables)


@pytest.fixture(scope="module")
def tokenizer():
    return train_bpe(["some text <|x|> and more"], 300, ["<s>", *TURN])


def with_template(tokenizer, template):
    inner = tokenizers.Tokenizer.from_str(json.dumps(tokenizer.state()["tokenizer"]))
    return BPETokenizer(inner, template=template, variables={"bos_token": "<s>"})


@pytest.mark.parametrize("feature", FEATURES)
def test_templates_render_as_in_transformers(tokenizer, feature):
    ours = with_template(tokenizer, FEATURES[feature])
    other = theirs(ours)
    for generate in (True, False):
        for tools, documents in ((None, None), (TOOLS, DOCUMENTS)):
            if tools is None and feature == "tojson":
                continue  # tools[0] of None
            options = {"tools": tools, "documents": documents}
            expected = other.apply_chat_template(
                MESSAGES,
                chat_template=ours.template,
                add_generation_prompt=generate,
                tokenize=False,
                enable_thinking=False,
                **options,
            )
            shown = {"generate": generate, "variables": {"enable_thinking": False}, **options}
            assert ours.chat(MESSAGES, **shown) == expected
            ids = other(expected, add_special_tokens=False)["input_ids"]
            assert ours.encode_chat(MESSAGES, **shown) == ids


def test_generation_blocks_say_what_is_scored(tokenizer):
    ours = with_template(tokenizer, FEATURES["generation"])
    found = theirs(ours).apply_chat_template(
        MESSAGES,
        chat_template=ours.template,
        return_dict=True,
        return_assistant_tokens_mask=True,
    )
    ids, scored = ours.chat_document(MESSAGES[:5])
    pieces = ours.decode([i for i, own in zip(ids, scored, strict=True) if own])
    mask = [i for i, own in zip(found["input_ids"], found["assistant_masks"], strict=True) if own]
    assert pieces == ours.decode(mask) == "call<think>why</think>\nFine."


def test_a_template_keeps_its_own_first_token(tokenizer):
    ours = with_template(tokenizer, FEATURES["own bos"])
    assert ours.special["<s>"] != ours.end
    ids, _ = ours.chat_document(MESSAGES)
    assert ids[0] == ours.special["<s>"] and ours.end not in ids[:-1]
    without = with_template(tokenizer, "{{ messages[0].role }}{% generation %}{% endgeneration %}")
    assert without.chat_document(MESSAGES)[0][0] == without.end


def test_chatml_takes_parts_and_calls():
    ours = ByteTokenizer(TURN)
    text = ours.chat([{"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}])
    assert text == "<|im_start|>user\nab<|im_end|>\n<|im_start|>assistant\n"
    called = ours.chat([{"role": "assistant", "content": None, "tool_calls": [CALL]}], generate=False)
    assert called.count("<tool_call>") == 1 and json.dumps(CALL["function"], ensure_ascii=False) in called
    with pytest.raises(ConfigError, match="parts of the type image"):
        ours.chat(MESSAGES)


def test_special_tokens_in_parts_calls_and_tools_stay_text():
    ours = ByteTokenizer(TURN, template="{{ messages | tojson }}{{ tools | tojson }}{{ '<|im_end|>' }}")
    messages = [{"role": "user", "content": [{"type": "text", "text": "<|im_end|>"}]}]
    ids = ours.encode_chat(messages, tools=[{"name": "<|im_end|>"}])
    assert ids.count(ours.special["<|im_end|>"]) == 1
    assert ours.decode(ids, special=True) == ours.chat(messages, tools=[{"name": "<|im_end|>"}])


@pytest.mark.parametrize(
    ("message", "reason"),
    [
        ({"role": "user", "content": ["text"]}, r"messages\[0\].content is \['text'\]"),
        ({"role": "assistant", "content": None}, r"messages\[0\].content is None"),
        ({"role": None, "content": "a"}, r"messages\[0\].role is None"),
        ({"role": "user", "content": "a", "x": object()}, "a object is no part of a conversation"),
    ],
)
def test_bad_messages_are_refused(message, reason):
    with pytest.raises(ConfigError, match=reason):
        ByteTokenizer(TURN).chat([message])


DOUBLED = "{{% set ns = namespace(x={0}) %}}{{% for i in range(90) %}}{{% set ns.x = {1} %}}{{% endfor %}}{{{{ {2} }}}}"
HOSTILE = {
    "division": "{{ 1/0 }}",
    "include": "{% include 'x' %}",
    "extends": "{% extends '/etc/passwd' %}",
    "import": "{% import 'x' as x %}",
    "range": "{{ range(10**8) | list }}",
    "recursion": "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "block": "{% block a %}{{ self.a() }}{% endblock %}",
    "loop": "{% for x in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "tree of calls": "{% macro f(n) %}{% if n %}{{ f(n - 1) }}{{ f(n - 1) }}{% endif %}{% endmacro %}{{ f(60) }}",
    "loops": "{% for i in range(100000) %}{% for j in range(100000) %}{% endfor %}{% endfor %}",
    "filtered loops": "{% for i in range(100000) %}{% for j in range(100000) if false %}{% endfor %}{% endfor %}",
    "repeat": "{{ 'x' * 10**10 }}",
    "list": "{{ [0] * 10**10 }}",
    "power": "{{ 10 ** (10 ** 10) }}",
    "squares": DOUBLED.format("9", "ns.x * ns.x", "ns.x"),
    "indent": "{{ 'a\nb' | indent(10**9) }}",
    "center": "{{ 'a' | center(10**10) }}",
    "method": "{{ 'a'.ljust(10**10) }}",
    "tabs": "{{ ('\t' * 1000).expandtabs(10**8) }}",
    "zeros": "{{ '1'.zfill(10**10) }}",
    "percent": "{{ '%10000000000d' % 1 }}",
    "percent, star": "{{ '%*d' % (10**9, 1) }}",
    "percent filter": "{{ '%.9999999999f' | format(1.0) }}",
    "percents": "{{ ('%(a)s' * 100000) % {'a': 'x' * 1000000} }}",
    "format": "{{ '{:>10000000000}'.format(1) }}",
    "format, nested": "{{ '{:{w}}'.format(1, w=10**10) }}",
    "format, filled": "{{ '{:x>9999999999}'.format('a') }}",
    "formats": "{{ ('{0}' * 100000).format('x' * 1000000) }}",
    "replace": "{{ ('a' * 1000000) | replace('a', 'b' * 1000000) }}",
    "replace, method": "{{ ('a' * 1000000).replace('a', 'b' * 1000000) }}",
    "join": "{{ range(100000) | join('x' * 1000000) }}",
    "join, method": "{{ ('x' * 1000000).join('y' * 100000) }}",
    "batch": "{{ [1] | batch(10**9, 0) | list }}",
    "slice": "{{ [1] | slice(10**9) | list }}",
    "round": "{{ 1.5 | round(10**9, 'ceil') }}",
    "sum": "{{ range(100000) | map('list') | sum(start=[]) }}{{ ([[0] * 1000] * 1000) | sum(start=[]) }}",
    "tojson": "{{ range(1000) | list | tojson(indent=10**9) }}",
    "deep tojson": "{% set ns = namespace(x=[]) %}{% for i in range(2000) %}{% set ns.x = [ns.x] %}{% endfor %}"
    "{{ ns.x | tojson }}",
    "text doubled": DOUBLED.format("'a'", "ns.x ~ ns.x", "1"),
    "text added": DOUBLED.format("'a'", "ns.x + ns.x", "1"),
    "lists doubled": DOUBLED.format("[1]", "[ns.x, ns.x]", "ns.x"),
    "tuples doubled": DOUBLED.format("(1,)", "(ns.x, ns.x)", "{ns.x: 1}"),
    "dicts doubled": DOUBLED.format("{}", "{'a': ns.x, 'b': ns.x}", "ns.x == {}"),
    "dict calls doubled": DOUBLED.format("1", "dict(a=ns.x, b=ns.x)", "ns.x | tojson"),
    "namespaces doubled": DOUBLED.format("1", "namespace(a=ns.x, b=ns.x)", "ns.x") + "{{ 1/0 }}",
    "macro arguments": "{% set ns = namespace(x=1) %}{% macro f() %}{% set ns.x = varargs %}{% endmacro %}"
    "{% for i in range(90) %}{{ f(ns.x, ns.x) }}{% endfor %}{{ ns.x }}",
    "captured": "{% set x %}{% for i in range(100000) %}" + "text" * 5000 + "{% endfor %}{% endset %}",
    "many": "{% set x = 'x' * 4000000 %}" + "".join(f"{{% set x{i} = x[1:] %}}" for i in range(3000)),
    "output": "{% for i in range(100000) %}" + "text" * 5000 + "{% endfor %}",
    "reverse search": "{{ ('a' * 4000000).rfind('b' + 'a' * 2000000) }}",
    "markup": "{{ ('<!--' * 1000000) | striptags }}",
    "lipsum": "{{ lipsum(10**6) }}",
    "bytes": "{{ (1).to_bytes(10**10, 'big') }}",
    "bits": "{{ 'a'.translate({97: 'x' * 1000}) }}",
    "dates": "{{ strftime_now('%c' * 1000000) }}",
    "namespace": "{% set ns = namespace() %}{% set ns.__class__ = 1 %}",
    "class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "globals": "{{ raise_exception.__globals__['json'] }}",
    "attr": "{{ 'a' | attr('encode') }}{{ ('a' | attr('encode'))() }}",
    "mutation": "{{ messages.append(1) }}",
    "undefined": "{{ a.b.c }}",
    "syntax": "{% if %}",
    "brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "large": "x" * 200_000,
    "filter": "{{ 1 | nothing }}",
    "types": "{{ messages + 1 }}",
    "int": "{{ ('9' * 5000) | int + '1' }}",
    "json": "{{ namespace | tojson }}",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_templates_end_in_our_error(kind, monkeypatch):
    monkeypatch.setattr(meter, "SECONDS", 0.5)
    with pytest.raises(ConfigError, match="chat template"):
        ByteTokenizer(template=HOSTILE[kind]).chat(MESSAGES)


PROGRAM = """
import resource, sys
from omnimix.modalities.text.tokenizer import ByteTokenizer
from omnimix.errors import ConfigError
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for template in sys.stdin.read().split(chr(0)):
    try:
        ByteTokenizer(template=template).chat([{"role": "user", "content": "a"}])
    except ConfigError:
        pass
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) >> 10)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ru_maxrss is kilobytes on Linux alone")
def test_hostile_templates_take_bounded_memory():
    kinds = [kind for kind in HOSTILE if kind not in ("loops", "filtered loops", "tree of calls")]
    templates = chr(0).join(HOSTILE[kind] for kind in kinds)
    done = subprocess.run([sys.executable, "-c", PROGRAM], input=templates, capture_output=True, text=True, check=True)
    assert int(done.stdout) < 600


def test_what_is_long_in_the_input_may_be_long_in_the_output():
    text = "word " * 2_000_000
    shown = ByteTokenizer(template="{% for m in messages %}{{ m.content | trim }}{% endfor %}").chat(
        [{"role": "user", "content": text}] * 2
    )
    assert len(shown) == 2 * len(text) - 2


def test_templates_render_in_threads():
    import concurrent.futures

    ours = ByteTokenizer(TURN)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        found = list(pool.map(lambda i: ours.chat([{"role": "user", "content": str(i)}]), range(64)))
    assert found == [f"<|im_start|>user\n{i}<|im_end|>\n<|im_start|>assistant\n" for i in range(64)]
    assert END not in found[0]
