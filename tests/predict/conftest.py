"""A small Llama-style SentencePiece model, trained once, and folders around it."""

import io
import json
import random
import re

import pytest
import sentencepiece

WORDS = re.findall(
    r"\S+",
    "the quick brown fox jumps over a lazy dog while every token asks the router which two of eight experts should "
    "answer; in 2023 Mixtral was a sparse mixture of experts, and (as they say) it knew 12345 things about cafés",
)
UNICODE = "Привет, мир! naïve café — 日本語のテキスト 🦊 [INST] [/INST] <s> </s>"


def train(**options) -> bytes:
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) + "  " + UNICODE for _ in range(300)]
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines),
        model_writer=model,
        model_type="bpe",
        vocab_size=400,
        character_coverage=0.99,
        byte_fallback=True,
        split_digits=True,
        normalization_rule_name="identity",
        num_threads=1,
        minloglevel=2,
        **{"remove_extra_whitespaces": False, **options},
    )
    return model.getvalue()


@pytest.fixture(scope="session")
def train_sentencepiece():
    """A function that trains a small SentencePiece model with the given deviations from Llama's options."""
    return train


@pytest.fixture(scope="session")
def llama_model() -> bytes:
    """A Llama-style SentencePiece model: BPE, byte fallback, prefix space, no normalisation."""
    return train()


@pytest.fixture
def tokenizer_folder(tmp_path, llama_model):
    """A function that makes a tokenizer folder: the Llama-style model plus the given JSON and text files."""

    def make(model: bytes = llama_model, **files):
        folder = tmp_path / f"model{len(list(tmp_path.iterdir()))}"
        folder.mkdir()
        (folder / "tokenizer.model").write_bytes(model)
        for name, content in files.items():
            if isinstance(content, str):
                (folder / f"{name}.jinja").write_text(content, encoding="utf-8")
            else:
                (folder / f"{name}.json").write_text(json.dumps(content), encoding="utf-8")
        return folder

    return make
