"""lm-eval's contract on a local task of each kind; every number is compared with a plain computation."""

import json
import math
import subprocess
import sys
from functools import partial

import pytest
import torch

import omnimix
from omnimix.__main__ import main
from omnimix.backbones.decoding import DiffusionConfig, GenerationConfig, diffuse, generate
from omnimix.errors import ConfigError, MissingPackage, UnknownName, UnsupportedCall, UnsupportedShape
from omnimix.modalities import save_model
from omnimix.modalities.text.chat import TURN
from omnimix.modalities.text.tokenizer import ByteTokenizer

pytest.importorskip("lm_eval")
BYTES = ByteTokenizer(TURN)
END = BYTES.end


@pytest.fixture(scope="module")
def adapter():
    from omnimix.interop import lm_eval

    return lm_eval


def language_model(objective: str = "causal", vocab_size: int = BYTES.vocab_size):
    torch.manual_seed(0)
    backbone = omnimix.BackboneConfig(
        dim=32, depth=2, pattern=["gla", "attention"], scan="forward" if objective == "causal" else "bidirectional"
    )
    config = omnimix.LanguageModelConfig(backbone=backbone, vocab_size=vocab_size, objective=objective)
    model = omnimix.LanguageModel(config).eval()
    with torch.no_grad():
        # New weights give nearly flat logits, whose order means nothing.
        for p in model.parameters():
            p.mul_(3)
    return model


def requests(kind: str, *arguments: tuple):
    from lm_eval.api.instance import Instance

    return [Instance(request_type=kind, doc={}, arguments=a, idx=i) for i, a in enumerate(arguments)]


def plain(model, ids: list[int], given: int) -> tuple[float, bool]:
    """log p of the ids behind the first `given`, from the logits of one pass."""
    with torch.no_grad():
        logits = model(torch.tensor([ids]))[0][0, given - 1 : -1].double()
    targets = torch.tensor(ids[given:])
    return (
        logits.log_softmax(-1)[range(len(targets)), targets].sum().item(),
        bool((logits.argmax(-1) == targets).all()),
    )


def close(found: float, expected: float) -> bool:
    return math.isclose(found, expected, rel_tol=1e-5)


PAIRS = [("The sky is", " blue"), ("", "no context"), ("ends with a space ", "word"), ("é", " ü and much longer")]


def test_the_package_is_the_real_one(adapter):
    """Our file has its name."""
    assert sys.modules["lm_eval"].__file__.endswith("lm_eval/__init__.py")
    from lm_eval.api.registry import get_model

    assert get_model("omnimix") is adapter.OmnimixLM


@pytest.mark.parametrize("at_once", [16384, 7])
def test_likelihoods_are_those_of_one_pass(adapter, monkeypatch, at_once):
    """However many tokens are read at a time."""
    monkeypatch.setattr(adapter, "TOKENS_AT_A_TIME", at_once)
    monkeypatch.setattr(adapter, "LOGITS_AT_A_TIME", 1000)
    model = language_model()
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size=3)
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        expected, best = plain(model, [END, *(context + continuation).encode()], 1 + len(context.rstrip().encode()))
        assert close(value, expected) and greedy is best
    # What the model itself writes is greedy.
    first = generate(model, [[END, *b"start"]], GenerationConfig(max_new_tokens=1)).tokens[0][0]
    tokens = [(None, [END, *b"start"], [first]), (None, [END, *b"start"], [first ^ 1])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(tokens, disable_tqdm=True)] == [True, False]


def test_documents_of_any_length(adapter, monkeypatch):
    monkeypatch.setattr(adapter, "TOKENS_AT_A_TIME", 64)
    model = language_model()
    texts = ["one document, " * 20, "", "short"]
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size=2)
    found = lm.loglikelihood_rolling(requests("loglikelihood_rolling", *((t,) for t in texts)), disable_tqdm=True)
    for text, value in zip(texts, found, strict=True):
        expected = plain(model, [END, *text.encode()], 1)[0] if text else 0.0
        assert close(value, expected)
    # In windows each token is still scored once, with what its window holds before it.
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_length=16)
    ids, expected = list(texts[0].encode()), 0.0
    for start in range(0, len(ids), 16):
        stop = min(start + 16, len(ids))
        before = ids[max(0, stop - 17) : start] or [END]
        expected += plain(model, before + ids[start:stop], len(before))[0]
    [value] = lm.loglikelihood_rolling(requests("loglikelihood_rolling", (texts[0],)), disable_tqdm=True)
    assert close(value, expected)


def test_long_contexts_lose_their_beginning(adapter):
    model = language_model()
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_length=8)
    [(value, _)] = lm.loglikelihood(requests("loglikelihood", ("0123456789", "abc")), disable_tqdm=True)
    assert close(value, plain(model, list(b"456789abc"), 6)[0])
    with pytest.raises(UnsupportedShape, match="max_length"):
        lm.loglikelihood(requests("loglikelihood", ("0", "a" * 9)), disable_tqdm=True)


def written(model, text: str, **options) -> str:
    config = GenerationConfig(**{"max_new_tokens": 24, "end": END} | options)
    return BYTES.decode(generate(model, [[END, *text.encode()]], config).tokens[0])


def test_texts_end_before_the_strings(adapter):
    model = language_model()
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size=2, max_gen_toks=24)
    contexts = ["one", "another one", "x"]
    whole = [written(model, text) for text in contexts]
    until = [whole[0][4:6], whole[1][9]]
    found = lm.generate_until(requests("generate_until", *((c, {"until": until}) for c in contexts)), True)
    for text, full in zip(found, whole, strict=True):
        places = [full.index(stop) for stop in until if stop in full]
        assert text == full[: min(places, default=None)]
    assert len(found[0]) <= 4
    beams = {"until": [], "num_beams": 2, "max_gen_toks": 5}
    assert lm.generate_until(requests("generate_until", ("one", beams)), True) == [
        written(model, "one", num_beams=2, max_new_tokens=5)
    ]
    with pytest.raises(UnsupportedCall, match="typical_p"):
        lm.generate_until(requests("generate_until", ("one", {"typical_p": 0.5})), True)


def test_drawn_texts_do_not_depend_on_the_batch(adapter):
    model = language_model()
    options = {"until": ["\n"], "do_sample": True, "temperature": 0.8, "top_p": 0.9, "top_k": 0, "max_gen_toks": 8}
    asked = requests("generate_until", *((c, options) for c in ("a", "longer", "a")))
    found = [adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size=n).generate_until(asked, True) for n in (1, 3)]
    assert found[0] == found[1]
    assert found[0][0] != found[0][2]


def test_chats(adapter):
    model = language_model()
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_gen_toks=16)
    text = lm.apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == BYTES.chat([{"role": "user", "content": "hi"}])
    assert lm.tok_encode(text)[:2] == [END, BYTES.special[TURN[0]]]
    assert lm.chat_template(True) == BYTES.template and lm.chat_template(False) is None
    assert lm.tokenizer_name == f"omnimix-{BYTES.fingerprint[:16]}"


@pytest.mark.parametrize("objective", ["causal", "masked"])
def test_a_special_token_ends_a_text(adapter, objective):
    """Though texts do not show it."""
    model = language_model(objective)
    if objective == "causal":
        tokens = generate(model, [[END, *b"one"]], GenerationConfig(max_new_tokens=8)).tokens[0]
    else:
        tokens = diffuse(model, [[END, *b"one"]], DiffusionConfig(max_new_tokens=8)).tokens[0]
    place = next(i for i, token in enumerate(tokens) if i > 1 and token not in (*tokens[:i], *b"one"))
    # The model now writes the special token wherever it wrote this one.
    pair = [tokens[place], BYTES.special[TURN[1]]]
    with torch.no_grad():
        model.embedding.weight[pair] = model.embedding.weight[pair[::-1]]
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_gen_toks=8)
    [text] = lm.generate_until(requests("generate_until", ("one", {"until": [TURN[1]]})), True)
    assert text == BYTES.decode(tokens[:place])


def test_ids_without_text_are_not_written(adapter):
    """Where a vocabulary was filled up, say to a multiple of 64."""
    model = language_model(vocab_size=320)
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_gen_toks=8)
    config = GenerationConfig(max_new_tokens=8)
    first = generate(model, [[END, *b"one"]], config).tokens[0][0]
    with torch.no_grad():
        model.embedding.weight[[first, 300]] = model.embedding.weight[[300, first]]
    assert generate(model, [[END, *b"one"]], config).tokens[0][0] == 300
    [text] = lm.generate_until(requests("generate_until", ("one", {"until": []})), True)
    config = GenerationConfig(max_new_tokens=8, forbidden=range(BYTES.vocab_size, 320), end=END)
    assert text == BYTES.decode(generate(model, [[END, *b"one"]], config).tokens[0])
    with pytest.raises(ConfigError, match="trained with"):
        adapter.OmnimixLM(model=language_model("masked", vocab_size=320), tokenizer=BYTES)


@pytest.mark.parametrize("objective", ["masked", "block", "sedd"])
def test_diffusion_likelihoods_are_seeded_bounds(adapter, objective):
    model = language_model(objective)
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size=3, samples=6, seed=3)
    assert "likelihood_standard_error" not in lm.get_model_info()
    found = lm.loglikelihood(requests("loglikelihood", *PAIRS), disable_tqdm=True)
    errors = []
    for (context, continuation), (value, greedy) in zip(PAIRS, found, strict=True):
        ids, given = [END, *(context + continuation).encode()], 1 + len(context.rstrip().encode())
        counted = (torch.arange(len(ids)) >= given)[None]
        expected = model.objective.log_likelihood(model, torch.tensor([ids]), counted=counted, samples=6, seed=3)
        assert close(value, -expected.nats.item())
        errors += expected.error.tolist()
        best = diffuse(model, [ids[:given]], DiffusionConfig(max_new_tokens=len(ids) - given)).tokens[0]
        assert greedy is (best == ids[given:])
    info = lm.get_model_info()
    assert info["likelihood"] == "bound from 6 draws, seed 3" and info["likelihood_samples"] == 6
    assert close(info["likelihood_standard_error"], sum(errors) / len(errors))
    context = [END, *b"start"]
    best = diffuse(model, [context], DiffusionConfig(max_new_tokens=3)).tokens[0]
    tokens = [(None, context, best), (None, context, [best[0] ^ 1, *best[1:]])]
    assert [greedy for _, greedy in lm._loglikelihood_tokens(tokens, disable_tqdm=True)] == [True, False]


def test_diffusion_writes(adapter):
    model = language_model("masked")
    lm = adapter.OmnimixLM(model=model, tokenizer=BYTES, max_gen_toks=8, steps=4)
    contexts = ["one", "another"]
    found = lm.generate_until(requests("generate_until", *((c, {"until": []}) for c in contexts)), True)
    for text, context in zip(found, contexts, strict=True):
        config = DiffusionConfig(max_new_tokens=8, steps=4, end=END)
        assert text == BYTES.decode(diffuse(model, [[END, *context.encode()]], config).tokens[0])
    with pytest.raises(UnsupportedCall, match="top_k"):
        lm.generate_until(requests("generate_until", ("one", {"top_k": 3})), True)


TASKS = {
    "toy_choice": """
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: label
target_delimiter: " "
metric_list: [{metric: acc}, {metric: acc_norm}]
""",
    "toy_rolling": """
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}, {metric: byte_perplexity}]
""",
    "toy_generate": """
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 6}
metric_list: [{metric: exact_match}]
""",
}
DOCUMENTS = [
    {"text": "The sky is", "choices": ["blue", "a stone", "seven"], "label": 0, "answer": "never this"},
    {"text": "Fire burns, water", "choices": ["sings", "flows"], "label": 1, "answer": "nor this"},
    {"text": "One, two,", "choices": ["three", "nine"], "label": 0, "answer": "or that"},
]


@pytest.fixture
def tasks(tmp_path, monkeypatch):
    """A folder with one local task of each kind, and a saved model."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_OFFLINE", "1")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    model = language_model()
    # One answer is what the model writes, so that not all are wrong.
    documents = [dict(d) for d in DOCUMENTS]
    for document in documents:
        text = written(model, document["text"], max_new_tokens=6).split("\n")[0]
        if text.isprintable() and text.strip() == text:
            document["answer"] = text
    file = tmp_path / "toy.jsonl"
    file.write_text("".join(json.dumps(d) + "\n" for d in documents))
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, text in TASKS.items():
        head = f"task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {file}}}}}\ntest_split: test"
        (folder / f"{name}.yaml").write_text(head + text + "metadata: {version: 1}\n")
    save_model(model, tmp_path / "run")
    BYTES.save(tmp_path / "run")
    return tmp_path, model, documents


def test_tasks_offline(adapter, tasks, capsys):
    """The command, a local task of each kind; every number by hand."""
    path, model, documents = tasks
    asked = ["text", "eval", "--run", str(path / "run"), "--tasks", ",".join(TASKS), "--json", str(path / "rows.json")]
    assert main([*asked, "--include_path", str(path / "tasks")]) == 0
    assert "toy_choice" in capsys.readouterr().out
    rows = {(row["task"], row["metric"]): row for row in json.loads((path / "rows.json").read_text())}
    right = []
    for d in documents:
        context = [END, *d["text"].encode()]
        values = [plain(model, [*context, *f" {choice}".encode()], len(context))[0] for choice in d["choices"]]
        right.append(values.index(max(values)) == d["label"])
    assert close(rows["toy_choice", "acc"]["value"], sum(right) / 3)
    total = sum(plain(model, [END, *d["text"].encode()], 1)[0] for d in documents)
    size = sum(len(d["text"].encode()) for d in documents)
    assert close(rows["toy_rolling", "bits_per_byte"]["value"], -total / size / math.log(2))
    assert close(rows["toy_rolling", "byte_perplexity"]["value"], math.exp(-total / size))
    matches = [written(model, d["text"], max_new_tokens=6).split("\n")[0] == d["answer"] for d in documents]
    assert close(rows["toy_generate", "exact_match"]["value"], sum(matches) / 3)
    assert {row["likelihood"] for row in rows.values()} == {"exact"}
    assert {row["documents"] for row in rows.values()} == {3}


def test_diffusion_results_say_what_they_are(adapter, tasks, monkeypatch):
    from lm_eval.tasks import TaskManager

    from omnimix.recipes.text.evaluate import evaluate, result_rows

    path, _, _ = tasks
    lm = adapter.OmnimixLM(model=language_model("masked"), tokenizer=BYTES, samples=4, seed=1)
    results = evaluate(lm, ["toy_choice", "toy_rolling"], include_path=str(path / "tasks"), limit=2)
    assert results["config"]["likelihood_samples"] == 4 and results["config"]["likelihood_seed"] == 1
    for row in result_rows(results):
        assert row["likelihood"] == "bound from 4 draws, seed 1" and row["likelihood_error"] > 0
        assert row["documents"] == 2
    # lm-eval's own tasks are thousands of files.
    monkeypatch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
    with pytest.raises(UnknownName, match="toy_choice"):
        evaluate(lm, ["toy_choise"], include_path=str(path / "tasks"))


def test_bad_arguments(adapter, tmp_path, monkeypatch, capsys):
    model = language_model()
    with pytest.raises(ConfigError, match="pass one"):
        adapter.OmnimixLM()
    with pytest.raises(ConfigError, match="needs one"):
        adapter.OmnimixLM(model=model)
    with pytest.raises(ConfigError, match="trained with"):
        adapter.OmnimixLM(model=model, tokenizer=ByteTokenizer([*TURN, "<|more|>"]))
    with pytest.raises(ConfigError, match="auto"):
        adapter.OmnimixLM(model=model, tokenizer=BYTES, batch_size="auto")
    with pytest.raises(ConfigError, match="samples"):
        adapter.OmnimixLM(model=model, tokenizer=BYTES, samples=0)
    assert main(["text", "eval", "--run", str(tmp_path), "--tasks", "x"]) == 2
    assert "not a run directory" in capsys.readouterr().err
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    from omnimix.interop.importing import wanted

    with pytest.raises(MissingPackage, match=r"'\.\[eval\]'"):
        wanted("lm_eval", "evaluation", "eval")


@pytest.mark.parametrize(("block", "exact"), [(1, True), (4, False)])
def test_blocks_of_one_token_are_no_bound(adapter, block, exact):
    from omnimix.backbones.heads.block import BlockDiffusionConfig

    backbone = omnimix.BackboneConfig(dim=32, depth=1, pattern=["attention"])
    config = omnimix.LanguageModelConfig(
        backbone=backbone,
        vocab_size=BYTES.vocab_size,
        objective=BlockDiffusionConfig(block=block),
    )
    info = adapter.OmnimixLM(model=omnimix.LanguageModel(config), tokenizer=BYTES).get_model_info()
    assert (info["likelihood"] == "exact") == exact == ("likelihood_samples" not in info)


def test_lm_evals_own_models_remain(adapter):
    code = (
        "import omnimix.interop.lm_eval as ours; from lm_eval.api.registry import get_model; "
        "assert get_model('omnimix') is ours.OmnimixLM; print(get_model('dummy').__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "DummyLM"


def test_the_default_device_of_lm_eval_need_not_exist(adapter, monkeypatch, caplog):
    from lm_eval.config.evaluate_config import EvaluatorConfig

    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    lm = adapter.OmnimixLM(model=language_model(), tokenizer=BYTES, device=EvaluatorConfig().device)
    assert lm.device.type == "cpu" and "cuda:0 is not available" in caplog.text
