"""A tokenizer.json made from the small SentencePiece model gives what the SentencePiece model itself gives."""

import json
import sys

import pytest
import sentencepiece
from hypothesis import given
from hypothesis import strategies as st

from predict.model.chat import apply_chat_template
from predict.model.tokenizer import IncrementalDetokenizer, TokenizerError, load_tokenizer

UNICODE = "Привет, мир! naïve café — 日本語のテキスト 🦊 [INST] [/INST] <s> </s>"
TEXT = st.text(max_size=60) | st.lists(
    st.sampled_from([*UNICODE.split(), " ", "  ", "\n", "\0", "a", "▁", "the", " fox", "experts", "12345"])
).map("".join)
TOKENS = st.lists(st.integers(0, 399) | st.sampled_from([1, 2, *range(0x80 + 3, 0x100 + 3)]), max_size=40)
TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]"
    "{% else %} {{ m.content }}{{ eos_token }}{% endif %}{% endfor %}"
)
REPLACE = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
METASPACE = {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False}
STYLES = {
    "prepend": {
        "normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, REPLACE]},
        "pre_tokenizer": None,
    },
    "metaspace-first": {"normalizer": None, "pre_tokenizer": METASPACE},
    "metaspace-always": {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "always"}},
}
NO_PREFIX = {
    "replace": {"normalizer": REPLACE, "pre_tokenizer": None},
    "metaspace-never": {"normalizer": None, "pre_tokenizer": METASPACE | {"prepend_scheme": "never"}},
}


def converted(model: bytes, **changes) -> dict:
    """The tokenizer.json of a SentencePiece BPE model, as transformers converts it."""
    processor = sentencepiece.SentencePieceProcessor(model_proto=model)
    pieces = processor.id_to_piece(list(range(processor.get_piece_size())))
    normal = {piece: i for i, piece in enumerate(pieces) if i > 2 and not processor.is_byte(i)}
    merges = [
        (piece[:cut], piece[cut:])
        for piece in sorted(normal, key=lambda piece: -processor.get_score(normal[piece]))
        for cut in range(1, len(piece))
        if piece[:cut] in normal and piece[cut:] in normal
    ]
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [added(i, piece) for i, piece in enumerate(pieces[:3])],
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": "<unk>",
            "fuse_unk": True,
            "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(pieces)},
            "merges": merges,
        },
        **STYLES["prepend"],
        **changes,
    }


def added(token_id: int, content: str, special: bool = True) -> dict:
    flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
    return {"id": token_id, "content": content, "special": special, **flags}


def write(folder, content, **files):
    for name, value in {"tokenizer": content, **files}.items():
        (folder / f"{name}.json").write_text(json.dumps(value), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def reference(llama_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sentencepiece")
    (folder / "tokenizer.model").write_bytes(llama_model)
    return load_tokenizer(folder)


@pytest.fixture(scope="module", params=STYLES)
def tokenizer(request, llama_model, tmp_path_factory):
    content = converted(llama_model, **STYLES[request.param])
    return load_tokenizer(write(tmp_path_factory.mktemp(request.param), content))


@given(text=TEXT)
def test_ids_are_those_of_sentencepiece(tokenizer, reference, text):
    if text.startswith((" ", "▁")) and not tokenizer._adds_second_space:
        assert tokenizer.encode(text + "a") == reference.encode(text[1:] + "a")  # a Metaspace adds no second space
    else:
        assert tokenizer.encode(text) == reference.encode(text)


@given(segments=st.lists(st.sampled_from([0, 1, 2]) | TEXT.filter(lambda text: text[:1] != "▁"), max_size=6))
def test_every_text_between_special_tokens_has_its_prefix_space(tokenizer, reference, segments):
    assert tokenizer.encode_segments(segments) == reference.encode_segments(segments)


@given(contents=st.lists(TEXT.filter(str.strip), min_size=3, max_size=3), turns=st.sampled_from([1, 3]))
def test_chats_are_those_of_sentencepiece(tokenizer, reference, contents, turns):
    roles = ("user", "assistant", "user")
    messages = [{"role": role, "content": text} for role, text in zip(roles, contents, strict=True)][:turns]
    for template in ("mixtral", TEMPLATE):
        assert apply_chat_template(tokenizer, messages, template) == apply_chat_template(reference, messages, template)


@given(prompt=TOKENS, ids=TOKENS)
def test_texts_are_those_of_sentencepiece_token_by_token(tokenizer, reference, prompt, ids):
    for skip in (True, False):
        streams = [IncrementalDetokenizer(t, prompt, skip) for t in (tokenizer, reference)]
        for token_id in ids:
            text, expected = (stream.push(token_id) for stream in streams)
            assert text == expected
        assert streams[0].finish() == streams[1].finish()


def test_names_sizes_and_special_tokens_are_those_of_sentencepiece(tokenizer, reference):
    for name in ("vocab_size", "bos_token_id", "eos_token_id", "unk_token_id", "eos_token_ids", "add_bos_token"):
        assert getattr(tokenizer, name) == getattr(reference, name)
    assert tokenizer.special_tokens == reference.special_tokens
    assert tokenizer.special_token_names == reference.special_token_names
    assert tokenizer.encode("<s>the</s>", parse_special=True) == reference.encode("<s>the</s>", parse_special=True)


@pytest.mark.parametrize("style", NO_PREFIX)
def test_a_file_that_adds_no_prefix_space_is_taken_at_its_word(llama_model, train_sentencepiece, tmp_path, style):
    folder = tmp_path / "sentencepiece"
    folder.mkdir()
    model = train_sentencepiece(add_dummy_prefix=False)
    (folder / "tokenizer.model").write_bytes(model)
    reference = load_tokenizer(folder)
    tokenizer = load_tokenizer(write(tmp_path, converted(model, **NO_PREFIX[style])))
    for text in ("the fox", " the", "  the", UNICODE, ""):
        assert tokenizer.encode(text) == reference.encode(text)
        assert tokenizer.encode(f"<s>{text}", parse_special=True) == reference.encode(f"<s>{text}", parse_special=True)
        assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize(
    "files",
    [
        {},
        {"added_tokens": {"<|im_end|>": 400}},
        {"tokenizer_config": {"added_tokens_decoder": {"400": {"content": "<|im_end|>", "special": True}}}},
    ],
    ids=["alone", "added_tokens.json", "added_tokens_decoder"],
)
def test_added_tokens_of_the_file_extend_the_vocabulary(llama_model, reference, tmp_path, files):
    content = converted(llama_model)
    content["added_tokens"] += [added(400, "<|im_end|>"), added(401, "<call>", special=False)]
    names = {"special_tokens_map": {"eos_token": "<|im_end|>"}}
    tokenizer = load_tokenizer(write(tmp_path, content, **names, **files))
    assert (tokenizer.vocab_size, tokenizer.eos_token_id) == (402, 400)
    the = reference.encode("the", add_bos=False)
    assert tokenizer.encode("the<call>the<|im_end|>", parse_special=True) == [1, *the, 401, *the, 400]
    assert tokenizer.encode("<call><|im_end|>") == reference.encode("<call><|im_end|>")
    assert tokenizer.decode([*the, 401, 400]) == "the<call>"


def test_nothing_is_cut_padded_or_left_to_chance(llama_model, reference, tmp_path):
    content = converted(
        llama_model,
        truncation={"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        padding={
            "strategy": {"Fixed": 64},
            "direction": "Right",
            "pad_to_multiple_of": None,
            "pad_id": 2,
            "pad_type_id": 0,
            "pad_token": "</s>",
        },
    )
    content["model"]["dropout"] = 0.5
    tokenizer = load_tokenizer(write(tmp_path, content))
    assert tokenizer.encode(UNICODE) == reference.encode(UNICODE)
    assert tokenizer.encode("a" * 500) == reference.encode("a" * 500)


def test_merges_in_one_string_and_holes_in_the_vocabulary_are_read(llama_model, reference, tmp_path):
    content = converted(llama_model)
    content["model"]["merges"] = [" ".join(pair) for pair in content["model"]["merges"]]
    content["model"]["vocab"]["\U0001f9a5"] = 500
    tokenizer = load_tokenizer(write(tmp_path, content))
    assert tokenizer.encode(UNICODE) == reference.encode(UNICODE)
    assert tokenizer.vocab_size == 501
    assert tokenizer.decode([450, 500]) == "\U0001f9a5"


def test_tokenizer_model_wins(llama_model, reference, tmp_path):
    (tmp_path / "tokenizer.model").write_bytes(llama_model)
    (tmp_path / "tokenizer.json").write_text("not read")
    (tmp_path / "added_tokens.json").write_text("{}")
    config = {"added_tokens_decoder": {"1": {"content": "<s>", "special": True}}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert load_tokenizer(tmp_path).encode(UNICODE) == reference.encode(UNICODE)


def test_without_the_package_the_error_says_what_to_install(llama_model, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tokenizers", None)
    with pytest.raises(TokenizerError, match=r"tokenizer\.json needs the package that reads it .*`pip install tokeniz"):
        load_tokenizer(write(tmp_path, converted(llama_model)))


def bpe(**changes):
    return {"model": {"type": "BPE", "vocab": {"a": 0}, "merges": [], "byte_fallback": True, **changes}}


BYTE_LEVEL = {"type": "Sequence", "pretokenizers": [{"type": "Split"}, {"type": "ByteLevel"}]}


@pytest.mark.parametrize(
    ("content", "kind"),
    [
        ({"model": {"type": "WordPiece", "vocab": {"a": 0}}}, "a WordPiece tokenizer"),
        ({"model": {"type": "Unigram", "vocab": [["a", 0.0]], "byte_fallback": True}}, "a Unigram tokenizer"),
        (bpe() | {"pre_tokenizer": BYTE_LEVEL}, "a byte-level BPE tokenizer"),
        (bpe(byte_fallback=False), "a BPE tokenizer without byte fallback"),
        (bpe(), "a BPE tokenizer with 0 of the 256 byte tokens"),
        ({}, "no tokenizer"),
    ],
    ids=["WordPiece", "Unigram", "byte-level", "no byte fallback", "no bytes", "nothing"],
)
def test_another_kind_is_named_with_the_one_supported(tmp_path, monkeypatch, content, kind):
    monkeypatch.setitem(sys.modules, "tokenizers", None)  # nobody is asked to install what would not help
    with pytest.raises(TokenizerError, match=rf"tokenizer\.json is {kind}.*; only BPE with byte fallback and '▁'"):
        load_tokenizer(write(tmp_path, content))


def test_a_bpe_that_leaves_spaces_as_they_are_is_refused(llama_model, tmp_path):
    with pytest.raises(TokenizerError, match="does not write spaces as '▁'"):
        load_tokenizer(write(tmp_path, converted(llama_model, normalizer=None)))


@pytest.mark.parametrize("damage", ["half", "merges", "stages", "added_tokens"])
def test_a_damaged_file_is_named(llama_model, tmp_path, damage):
    content = converted(llama_model)
    if damage == "merges":
        content["model"]["merges"].append(["no such", "pieces"])
    elif damage == "stages":
        content["normalizer"] = {"type": "Sequence", "normalizers": 7}
    elif damage == "added_tokens":
        content["added_tokens"] = [{"content": "<s>"}]
    file = write(tmp_path, content) / "tokenizer.json"
    if damage == "half":
        file.write_bytes(file.read_bytes()[:2000])
    expected = {"half": r"tokenizer\.json is not valid JSON", "added_tokens": "describes its added tokens"}
    with pytest.raises(
        TokenizerError, match=expected.get(damage, r"tokenizer\.json is not a readable tokenizer\.json")
    ):
        load_tokenizer(tmp_path)
