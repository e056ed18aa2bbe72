"""What `omnimix.load` gives beyond predictions: features, embeddings, saving, and calls of several threads."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch

import omnimix as om
from omnimix.errors import CheckpointError, ConfigError, UnsupportedShape
from omnimix.modalities import ByteTokenizer
from omnimix.modalities.text.chat import TURN

INPUTS = {
    "image": lambda n: list(torch.rand(n, 3, 16, 16)),
    "video": lambda n: list(torch.rand(n, 6, 3, 16, 16)),
    "audio": lambda n: list(0.1 * torch.randn(n, 16_000)),
}


@pytest.mark.parametrize(("kind", "grid"), [("image", (4, 4)), ("video", (2, 1, 1)), ("audio", None)])
def test_features_are_what_the_classifier_is_given(kind, grid, saved: Path):
    predictor = om.load(saved / kind)
    inputs = INPUTS[kind](3)
    pooled = predictor.features(inputs, batch_size=2)
    assert pooled.shape == (3, 16) and pooled.dtype == torch.float32
    logits = predictor.model.head.classifier(pooled)
    found = [best.index for [best] in predictor.predict(inputs)]
    assert found == logits.argmax(-1).tolist()
    torch.testing.assert_close(predictor.features(inputs[1]), pooled[1], atol=1e-5, rtol=1e-4)
    maps = predictor.features(inputs, pooled=False)
    assert maps.shape[:2] == (3, 16) and (grid is None or maps.shape[2:] == grid)
    # The head of these models takes the mean over the map.
    torch.testing.assert_close(maps.flatten(2).mean(-1), pooled, atol=1e-5, rtol=1e-4)


def test_clips_of_several_lengths(saved: Path):
    predictor = om.load(saved / "audio")
    clips = [0.1 * torch.randn(n) for n in (16_000, 9_000)]
    together, alone = predictor.features(clips), [predictor.features(clip) for clip in clips]
    torch.testing.assert_close(together, torch.stack(alone), atol=1e-5, rtol=1e-4)
    with pytest.raises(UnsupportedShape, match="pooled=True"):
        predictor.features(clips, pooled=False)


def test_arrays_and_tensors_of_many(saved: Path):
    predictor = om.load(saved / "image")
    batch = torch.rand(3, 3, 16, 16)
    wanted = predictor.predict(list(batch))
    assert predictor.predict(batch) == wanted
    assert predictor.predict(batch.permute(0, 2, 3, 1).numpy()) == wanted
    assert predictor.predict(image for image in batch) == wanted
    frames = np.random.default_rng(0).integers(0, 255, (2, 6, 16, 16, 3), dtype=np.uint8)
    assert len(om.load(saved / "video").predict(frames)) == 2
    with pytest.raises(ConfigError, match="inputs is empty"):
        predictor.features([])
    with pytest.raises(ConfigError, match="batch_size is 0"):
        predictor.features(batch, batch_size=0)


@pytest.mark.parametrize("kind", list(INPUTS))
def test_two_threads_get_the_same_answers(kind, saved: Path):
    predictor = om.load(saved / kind)
    inputs = INPUTS[kind](4)
    wanted = [predictor.predict(one, top=3) for one in inputs]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(3):
            assert list(pool.map(lambda one: predictor.predict(one, top=3), inputs)) == wanted


def test_text_embeds_chats_and_generates(saved: Path, tmp_path: Path):
    writer = om.load(saved / "text")
    found = writer.embed(["a text", "another one", "a text"])
    assert found.shape == (3, 16) and torch.equal(found[0], found[2]) and not torch.equal(found[0], found[1])
    ids = torch.tensor([[writer.tokenizer.end, *writer.tokenizer.encode("a text")]])
    with torch.no_grad():
        wanted = writer.model.hidden(ids, om.Layout(causal=True)).y[0].mean(0)
    torch.testing.assert_close(writer.embed("a text"), wanted, atol=1e-6, rtol=1e-5)
    assert writer.embed([]).shape == (0, 16)
    [one] = writer.generate("a text", max_new_tokens=3, temperature=0.0)
    assert len(one.tokens) <= 3
    assert one == writer.generate(["a text"], om.GenerationConfig(max_new_tokens=3, temperature=0.0))[0]
    with pytest.raises(ConfigError, match="did you mean 'max_new_tokens'"):
        writer.generate("a text", max_new_token=3)
    with ThreadPoolExecutor(2) as pool:
        jobs = [pool.submit(writer.generate, "a text", max_new_tokens=3, temperature=0.0) for _ in range(4)]
        assert all(job.result() == [one] for job in jobs)
    writer.to("cpu").save(tmp_path)
    assert om.load(tmp_path).generate("a text", max_new_tokens=3, temperature=0.0) == [one]


def test_a_chat():
    tokenizer = ByteTokenizer(TURN)
    backbone = om.BackboneConfig(dim=16, depth=1)
    model = om.LanguageModel(om.LanguageModelConfig(backbone=backbone, vocab_size=tokenizer.vocab_size)).eval()
    writer = om.TextGenerator(model, tokenizer)
    reply = writer.chat("hello", max_new_tokens=4, temperature=0.0)
    assert reply == writer.generate([[{"role": "user", "content": "hello"}]], max_new_tokens=4, temperature=0.0)[0].text


def test_a_model_of_ones_own_is_saved_with_its_preprocessing(tmp_path: Path):
    model = om.create_model("vit_tiny_gla_patch16_224", classes=2, dim=16, depth=1, size=16, patch=4)
    preprocess = om.ImagePreprocess(classes=("cat", "dog"), size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    om.Predictor(model, preprocess).save(tmp_path)
    image = torch.rand(3, 16, 16)
    wanted = om.Predictor(model, preprocess).predict(image, top=2)
    assert om.load(tmp_path).predict(image, top=2) == wanted
    assert om.load(tmp_path / "model.safetensors").predict(image, top=2) == wanted
    other = om.ImagePreprocess(classes=("cat",), size=16, channels=3, mean=(0.5,) * 3, std=(0.25,) * 3)
    with pytest.raises(ConfigError, match="number of classes is 1, and the model has 2"):
        om.Predictor(model, other)
    with pytest.raises(ConfigError, match="ImageClassifier with AudioPreprocess"):
        om.Predictor(model, om.AudioPreprocess(classes=("cat", "dog"), rate=8000, seconds=None))
    (tmp_path / "best.ckpt").write_bytes(b"x")
    with pytest.raises(CheckpointError, match="give the directory of a run"):
        om.load(tmp_path / "best.ckpt")
