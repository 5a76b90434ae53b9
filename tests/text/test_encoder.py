"""Text encoders against transformers and sentence-transformers themselves."""

import logging
import shutil
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor
from torch.nn.functional import normalize
from transformers import (
    BertConfig,
    BertModel,
    CLIPConfig,
    CLIPModel,
    PreTrainedTokenizerFast,
    SiglipConfig,
    SiglipModel,
)

from metr.errors import ConfigError, DependencyError, ModelError
from metr.hub import minilm_folder
from metr.text import encoder, language_model
from metr.text.encoder import TEMPLATES, TextEncoder, TextEncoderConfig, phrase_of, phrases
from metr.text.language_model import LanguageModel, LanguageModelSource
from metr.text.vocabulary import Vocabulary

WORDS = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "an", "the", "photo", "of", "cat", "dog", "red", "blood"]
WORDS += ["cell", "white", "king", "close", "up"]
NAMES = ["cat", "white-king", "red blood cell", "dog"]
SMALL = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 32}


@pytest.fixture(autouse=True)
def _own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("METR_CACHE", str(tmp_path / "cache"))


def save_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words."""
    words = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    special = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, eos_token="[SEP]", **special)
    tokenizer.save_pretrained(folder)
    return tokenizer


Reference = Callable[[Sequence[str]], Tensor]


def bert(folder: Path, pooling: str = "mean") -> Reference:
    """A BERT of random weights, and its sentence vectors one by one, which need no padding."""
    tokenizer = save_tokenizer(folder)
    model = BertModel(BertConfig(vocab_size=len(WORDS), **SMALL)).eval()
    model.save_pretrained(folder)

    def embed(sentence: str) -> Tensor:
        states = model(**tokenizer(sentence, return_tensors="pt", return_token_type_ids=False)).last_hidden_state[0]
        return states[0] if pooling == "cls" else states.mean(0)

    return lambda sentences: normalize(torch.stack([embed(sentence) for sentence in sentences]), dim=-1)


def clip(folder: Path) -> Reference:
    """A CLIP of random weights, saved whole as its authors do, and its own projected text features."""
    tokenizer = save_tokenizer(folder)
    text = {"vocab_size": len(WORDS), "eos_token_id": 3, "bos_token_id": 2, "projection_dim": 12, **SMALL}
    vision = {"image_size": 8, "patch_size": 4, "projection_dim": 12, **SMALL}
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)).eval()
    model.save_pretrained(folder)

    def embed(sentence: str) -> Tensor:
        tokens = tokenizer(sentence, return_tensors="pt", return_token_type_ids=False)
        return model.get_text_features(**tokens).pooler_output[0]

    return lambda sentences: normalize(torch.stack([embed(sentence) for sentence in sentences]), dim=-1)


def siglip(folder: Path) -> Reference:
    """A SigLIP of random weights, which reads all its positions, padding too."""
    tokenizer = save_tokenizer(folder)
    text = {"vocab_size": len(WORDS), "max_position_embeddings": 16, "projection_size": 12, **SMALL}
    vision = {"image_size": 8, "patch_size": 4, **SMALL}
    model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision)).eval()
    model.save_pretrained(folder)

    def embed(sentence: str) -> Tensor:
        tokens = tokenizer(sentence, padding="max_length", max_length=16, return_tensors="pt")
        return model.get_text_features(input_ids=tokens["input_ids"]).pooler_output[0]

    return lambda sentences: normalize(torch.stack([embed(sentence) for sentence in sentences]), dim=-1)


@pytest.mark.parametrize(("make", "width"), [(bert, 16), (clip, 12), (siglip, 12)])
@torch.no_grad()
def test_embeddings_are_the_mean_of_normalised_sentences(
    make: Callable[[Path], Reference], width: int, tmp_path: Path
) -> None:
    reference = make(tmp_path / "model")
    encoder = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model")))
    vocabulary = Vocabulary.of(NAMES, {"cat": "a red cat"})
    found = encoder.embed(vocabulary)
    sentences = [reference(phrases(name, vocabulary.prompts.get(name))) for name in NAMES]
    expected = normalize(torch.stack([rows.mean(0) for rows in sentences]), dim=-1)
    assert encoder.width == width
    assert found.shape == (4, width)
    assert torch.allclose(found, expected, atol=1e-5)
    assert not found.requires_grad
    assert (found[0] - encoder.embed(NAMES)[0]).abs().max() > 1e-3, "a prompt takes the name's place"


@torch.no_grad()
def test_a_folder_says_how_it_was_trained_to_pool(tmp_path: Path) -> None:
    folder = tmp_path / "model"
    reference = bert(folder, pooling="cls")
    (folder / "1_Pooling").mkdir()
    (folder / "1_Pooling" / "config.json").write_text('{"pooling_mode_cls_token": true}')
    auto = TextEncoder(TextEncoderConfig(source=str(folder), templates=("{}",)))
    assert torch.allclose(auto.embed(NAMES), reference([phrases(name)[0] for name in NAMES]), atol=1e-5)
    mean = TextEncoder(TextEncoderConfig(source=str(folder), templates=("{}",), pooling="mean"))
    assert mean.identity != auto.identity
    assert (mean.embed(NAMES) - auto.embed(NAMES)).abs().max() > 1e-3


@torch.no_grad()
def test_embeddings_do_not_depend_on_the_batch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for make in (bert, clip, siglip):
        folder = tmp_path / make.__name__
        make(folder)
        model = LanguageModel(LanguageModelSource.find(str(folder), None, "auto"))
        sentences = ["cat", "a photo of the red blood cell", "white king", "dog", "a cat", "the dog close up", "cat"]
        together = model.encode(sentences)
        monkeypatch.setattr(language_model, "_BATCH", 2)
        assert torch.allclose(model.encode(sentences), together, atol=1e-6)
        assert torch.allclose(model.encode(sentences[1:2]), together[1:2], atol=1e-6)
        monkeypatch.undo()


def test_minilm_equals_sentence_transformers() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        sentence_transformers = pytest.importorskip("sentence_transformers")
        theirs = sentence_transformers.SentenceTransformer(str(minilm_folder()), device="cpu")
    sentences = ["red blood cell", "a photo of a penguin", "Platelets", "a", "ace of spades " * 8, "naïve café, 42%"]
    expected = theirs.encode(sentences, convert_to_tensor=True, normalize_embeddings=True, show_progress_bar=False)
    found = LanguageModel(LanguageModelSource.find("bundled:minilm", None, "auto")).encode(sentences)
    assert (found - expected.cpu()).abs().max() < 1e-5


def test_minilm_knows_what_names_mean() -> None:
    encoder = TextEncoder()
    assert encoder.width == 384
    cat, kitten, truck = encoder.embed(["cat", "kitten", "truck"])
    assert cat @ kitten > 0.6
    assert cat @ truck < 0.5
    assert torch.allclose(cat.norm(), torch.tensor(1.0))


def test_the_model_is_loaded_only_for_new_phrases(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path / "model")
    config = TextEncoderConfig(source=str(tmp_path / "model"))
    first = TextEncoder(config).embed(NAMES)

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("the language model was loaded")

    monkeypatch.setattr("metr.text.language_model.LanguageModel", refuse)
    again = TextEncoder(config)
    assert torch.equal(again.embed(["dog", "white_king", "cat"]), first[[3, 1, 0]])
    with pytest.raises(AssertionError, match="was loaded"):
        again.embed(["red king"])


def test_many_names_are_embedded_and_kept_piece_by_piece(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bert(tmp_path / "model")
    config = TextEncoderConfig(source=str(tmp_path / "model"))
    whole = TextEncoder(config, cache_root=tmp_path / "whole").embed(NAMES)
    monkeypatch.setattr(encoder, "_AT_ONCE", 2)
    pieces: list[int] = []
    embed = TextEncoder._embed_phrases

    def stopping(self: TextEncoder, some: Sequence[str]) -> torch.Tensor:
        pieces.append(len(some))
        if len(pieces) == 2:
            raise KeyboardInterrupt
        return embed(self, some)

    monkeypatch.setattr(TextEncoder, "_embed_phrases", stopping)
    with pytest.raises(KeyboardInterrupt):
        TextEncoder(config, cache_root=tmp_path / "pieces").embed(NAMES)
    again = TextEncoder(config, cache_root=tmp_path / "pieces").embed(NAMES)
    assert torch.allclose(again, whole, atol=1e-6)
    assert sum(pieces[2:]) == len(NAMES) - 2, "the first piece is not embedded again"


def test_identity_is_of_content_not_of_place(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    shutil.copytree(tmp_path / "model", tmp_path / "moved")
    (tmp_path / "moved" / "README.md").write_text("says nothing of the weights")
    first = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model")))
    assert TextEncoder(TextEncoderConfig(source=str(tmp_path / "moved"))).identity == first.identity
    other = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model"), templates=("{}",)))
    assert other.identity != first.identity
    bert(tmp_path / "moved")
    assert TextEncoder(TextEncoderConfig(source=str(tmp_path / "moved"))).identity != first.identity


def test_names_alike_in_words_are_embedded_once(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    rows = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model"))).embed(["white-king", "white_king", "cat"])
    assert torch.equal(rows[0], rows[1])


def test_release_frees_the_model(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    encoder = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model")))
    first = encoder.embed(["cat"])
    encoder.release()
    assert torch.equal(encoder.embed(["cat", "dog"])[:1], first)


def test_without_a_cache_folder_it_still_works(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    bert(tmp_path / "model")
    (tmp_path / "file").write_text("in the way")
    encoder = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model")), cache_root=tmp_path / "file")
    with caplog.at_level(logging.WARNING):
        assert encoder.embed(NAMES).shape == (4, 16)
        assert encoder.embed([*NAMES, "king"]).shape == (5, 16)
    assert len(caplog.records) == 1


# --- errors --------------------------------------------------------------------------------------------------------


def test_hub_out_of_reach_is_explained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ModelError, match=r"openai/clip-vit-base-patch32(.|\n)*name its folder"):
        TextEncoder(TextEncoderConfig(source="openai/clip-vit-base-patch32"))


def test_a_folder_without_a_model_is_explained(tmp_path: Path) -> None:
    with pytest.raises(ModelError, match=r"must hold config\.json"):
        TextEncoder(TextEncoderConfig(source=str(tmp_path)))
    with pytest.raises(ModelError, match="did you mean 'bundled:minilm'"):
        TextEncoder(TextEncoderConfig(source="bundled:minlm"))


def test_damaged_weights_are_explained(tmp_path: Path) -> None:
    bert(tmp_path / "model")
    (tmp_path / "model" / "model.safetensors").write_bytes(b"not weights")
    encoder = TextEncoder(TextEncoderConfig(source=str(tmp_path / "model")))
    with pytest.raises(ModelError, match="cannot load this model"):
        encoder.embed(["cat"])


def test_pooling_that_does_not_suit_is_refused(tmp_path: Path) -> None:
    bert(tmp_path / "bert")
    clip(tmp_path / "clip")
    with pytest.raises(ConfigError, match=r"'projection' does not suit a bert(.|\n)*mean or cls"):
        TextEncoder(TextEncoderConfig(source=str(tmp_path / "bert"), pooling="projection"))
    with pytest.raises(ConfigError, match="'mean' does not suit a clip"):
        TextEncoder(TextEncoderConfig(source=str(tmp_path / "clip"), pooling="mean"))


@pytest.mark.parametrize("templates", [[], ["a photo"], ["{} and {}"]])
def test_templates_are_checked(templates: list[str]) -> None:
    with pytest.raises(ConfigError, match=r"hold \{\} once"):
        TextEncoderConfig.checked({"templates": templates})


def test_the_bundled_package_is_needed_for_unknown_phrases_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    TextEncoder(cache_root=tmp_path).embed(["fish"])

    def missing() -> Path:
        raise DependencyError("the package is not installed")

    monkeypatch.setattr("metr.text.language_model.minilm_folder", missing)
    assert TextEncoder(cache_root=tmp_path).embed(["fish"]).shape == (1, 384)
    with pytest.raises(DependencyError, match="not installed"):
        TextEncoder(cache_root=tmp_path).embed(["fish", "frog"])


@pytest.mark.parametrize(
    ("name", "phrase"),
    [
        ("white-king", "white king"),
        ("traffic_light", "traffic light"),
        ("10-of_hearts", "10 of hearts"),
        ("dining  table", "dining table"),
        ("_private_", "private"),
        ("RBC", "RBC"),
        ("-", "-"),
    ],
)
def test_identifiers_are_read_as_words(name: str, phrase: str) -> None:
    assert phrase_of(name) == phrase


def test_a_prompt_is_taken_as_written() -> None:
    assert phrase_of("x", "T-shirt with a_b") == "T-shirt with a_b"
    assert phrases("x", "red blood cell", ["{}", "a photo of a {}"]) == (
        "red blood cell",
        "a photo of a red blood cell",
    )


@pytest.mark.parametrize(
    ("name", "sentence"),
    [
        ("cat", "a photo of a cat"),
        ("apple", "a photo of an apple"),
        ("hourglass", "a photo of an hourglass"),
        ("unicorn", "a photo of a unicorn"),
        ("umbrella", "a photo of an umbrella"),
        ("RBC", "a photo of an RBC"),
        ("WBC", "a photo of a WBC"),
        ("x_ray", "a photo of a x ray"),
        ("the moon", "a photo of the moon"),
        ("{}", "a photo of a {}"),
        (r"\1", r"a photo of a \1"),
    ],
)
def test_articles_suit_the_phrase(name: str, sentence: str) -> None:
    assert phrases(name, None, ["a photo of a {}"]) == (sentence,)
    assert phrases(name, None, ["a photo of an {}"]) == (sentence,)
    assert phrases(name, None, ["see: {}"]) == (f"see: {phrase_of(name)}",)


def test_every_template_has_one_place() -> None:
    assert all(template.count("{}") == 1 for template in TEMPLATES)
    assert len(set(phrases("cat"))) == len(TEMPLATES)
