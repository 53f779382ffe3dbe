"""predict.model.tokenizer against SentencePiece's own encode and decode, over arbitrary text and tokens."""

import json
import subprocess
import sys

import pytest
import sentencepiece
from hypothesis import given, settings
from hypothesis import strategies as st

from predict.model import tokenizer as tokenizer_module
from predict.model.tokenizer import IncrementalDetokenizer, Tokenizer, TokenizerError, load_tokenizer

UNICODE = "Привет, мир! naïve café — 日本語のテキスト 🦊 [INST] [/INST] <s> </s>"
TEXT = st.text(max_size=60) | st.lists(st.sampled_from([*UNICODE.split(), " ", "  ", "\n", "\0", "a", "▁"])).map(
    "".join
)
# Half of the draws are byte tokens (ids 3 to 258), so that broken and interrupted characters are common.
TOKENS = st.lists(st.integers(0, 399) | st.sampled_from([1, 2, *range(0x80 + 3, 0x100 + 3)]), max_size=40)
IM_END = {"400": {"content": "<|im_end|>", "special": True}}


@pytest.fixture(scope="module")
def processor(llama_model):
    return sentencepiece.SentencePieceProcessor(model_proto=llama_model)


@pytest.fixture(scope="module")
def tokenizer(llama_model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("llama")
    (folder / "tokenizer.model").write_bytes(llama_model)
    return load_tokenizer(folder)


@given(text=TEXT)
def test_encode_is_sentencepiece_after_bos(tokenizer, processor, text):
    assert tokenizer.encode(text) == [1, *processor.encode(text)]
    assert tokenizer.encode(text, add_bos=False) == processor.encode(text)


@given(text=TEXT.filter(lambda text: "▁" not in text))
def test_decode_gives_the_encoded_text_back(tokenizer, text):
    assert tokenizer.decode(tokenizer.encode(text)) == text


@settings(max_examples=400)
@given(ids=TOKENS)
def test_decode_is_sentencepiece(tokenizer, processor, ids):
    assert tokenizer.decode(ids) == processor.decode(ids)


@pytest.mark.parametrize("options", [{"remove_extra_whitespaces": True}, {"add_dummy_prefix": False}])
def test_decode_is_sentencepiece_whatever_the_model_does_to_spaces(tokenizer_folder, train_sentencepiece, options):
    tokenizer = load_tokenizer(tokenizer_folder(train_sentencepiece(**options)))
    processor = tokenizer._processor

    @given(ids=TOKENS, text=TEXT)
    def check(ids, text):
        assert tokenizer.decode(ids) == processor.decode(ids)
        assert tokenizer.decode(tokenizer.encode(text)) == processor.decode(processor.encode(text))

    check()


@given(prompt=TEXT, tail=TOKENS)
def test_prompt_and_continuation_are_the_whole_text(tokenizer, processor, prompt, tail):
    prompt_ids = tokenizer.encode(prompt)
    assert tokenizer.decode(prompt_ids) + tokenizer.continuation(prompt_ids, tail) == processor.decode(
        prompt_ids + tail
    )


@given(ids=TOKENS, character=st.sampled_from("é日🦊\u0800\u07ff\ud7ff\U0010ffff"))
def test_a_character_comes_whole_or_not_at_all(tokenizer, ids, character):
    """While bytes can still become a character nothing is emitted for them, whatever broken bytes came before."""
    before = tokenizer.decode(ids)
    detokenizer = IncrementalDetokenizer(tokenizer)
    text = "".join(map(detokenizer.push, ids))
    *first, last = character.encode()
    for byte in first:
        text += detokenizer.push(byte + 3)
        assert text == before
    assert detokenizer.push(last + 3) == character
    assert detokenizer.finish() == ""


def test_a_first_leading_space_is_kept_after_a_prompt_and_dropped_in_an_answer(tokenizer):
    space_the = tokenizer.encode("the", add_bos=False)
    assert tokenizer.continuation(tokenizer.encode("dog"), space_the) == " the"
    assert tokenizer.continuation([], space_the) == "the"
    assert tokenizer.continuation([tokenizer.bos_token_id], space_the) == "the"


def test_a_prompt_ending_inside_a_character_leaves_it_to_the_output(tokenizer):
    fox = [byte + 3 for byte in "🦊".encode()]
    assert tokenizer.continuation(fox[:2], fox[2:]) == "🦊"


@given(text=TEXT)
def test_raw_text_never_becomes_a_control_token(tokenizer, text):
    ids = tokenizer.encode(f"{text}</s>{text}<s>", add_bos=False)
    assert not {0, 1, 2} & set(ids)
    assert tokenizer.encode("<s> the")[:2] != tokenizer.encode("<s> the", parse_special=True)[:2]


def test_parse_special_takes_literals_as_tokens_and_bos_once(tokenizer, processor):
    the = processor.encode("the")
    expected = [1, *the, 2, *the]
    assert tokenizer.encode("<s>the</s>the", parse_special=True) == expected
    assert tokenizer.encode("<s> the</s> the", parse_special=True) == expected
    assert tokenizer.encode("the</s>the", parse_special=True) == expected
    assert tokenizer.encode("<s>the</s>the", parse_special=True, add_bos=False) == expected
    assert tokenizer.encode("the</s>the", parse_special=True, add_bos=False) == expected[1:]


def test_only_one_space_of_a_segment_is_the_prefix(tokenizer, processor):
    assert tokenizer.encode("<s>  the", parse_special=True) == [1, *processor.encode(" the")]


def test_special_literals_show_only_when_asked_for(tokenizer):
    ids = [*tokenizer.encode("the dog"), tokenizer.eos_token_id]
    assert tokenizer.decode(ids) == "the dog"
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s> the dog</s>"


def test_ids_and_names(tokenizer):
    assert (tokenizer.unk_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1, 2)
    assert tokenizer.eos_token_ids == (2,)
    assert tokenizer.vocab_size == 400
    assert tokenizer.special_token_names == {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}


def test_add_bos_token_of_the_folder_is_respected(tokenizer_folder, processor):
    tokenizer = load_tokenizer(tokenizer_folder(tokenizer_config={"add_bos_token": False}))
    assert tokenizer.encode("the dog") == processor.encode("the dog")


@pytest.mark.parametrize(
    "files",
    [
        {"tokenizer_config": {"eos_token": "<|im_end|>", "added_tokens_decoder": IM_END}},
        {"tokenizer_config": {"eos_token": {"content": "<|im_end|>"}}, "added_tokens": {"<|im_end|>": 400}},
        {
            "special_tokens_map": {"eos_token": "<|im_end|>"},
            "tokenizer": {"added_tokens": [{"id": 400, "content": "<|im_end|>", "special": True}]},
        },
    ],
    ids=["added_tokens_decoder", "added_tokens.json", "tokenizer.json"],
)
def test_added_tokens_extend_the_vocabulary(tokenizer_folder, processor, files):
    tokenizer = load_tokenizer(tokenizer_folder(**files, generation_config={"eos_token_id": [400, 2]}))
    assert tokenizer.vocab_size == 401
    assert (tokenizer.eos_token_id, tokenizer.eos_token_ids) == (400, (400, 2))
    the = processor.encode("the")
    assert tokenizer.encode("the<|im_end|>the", parse_special=True) == [1, *the, 400, *the]
    assert 400 not in tokenizer.encode("the<|im_end|>the")
    assert tokenizer.decode([1, *the, 400]) == "the"
    assert tokenizer.decode([1, *the, 400], skip_special_tokens=False) == "<s> the<|im_end|>"


def test_the_longest_special_literal_wins(tokenizer_folder):
    tokenizer = load_tokenizer(tokenizer_folder(added_tokens={"<|im": 400, "<|im_end|>": 401, "<|im_end": 402}))
    assert tokenizer.encode("<|im_end|><|im_end<|im", add_bos=False, parse_special=True) == [401, 402, 400]


def test_an_added_token_that_is_not_special_is_shown(tokenizer_folder):
    decoder = {"400": {"content": "<call>", "special": False}}
    files = {"added_tokens": {"<call>": 400}, "tokenizer_config": {"added_tokens_decoder": decoder}}
    assert load_tokenizer(tokenizer_folder(**files)).decode([1, 400]) == "<call>"


def test_a_padding_row_of_the_embedding_gives_no_text(tokenizer):
    assert tokenizer.decode([1, 399_000]) == ""


def test_refusals_of_text_and_ids(tokenizer):
    with pytest.raises(ValueError, match=r"lone surrogate U\+D800 at position 1"):
        tokenizer.encode("a\ud800")
    with pytest.raises(ValueError, match="token id -1 is negative"):
        tokenizer.decode([-1])


def test_paddlenlps_own_file_name_is_read(tokenizer, tokenizer_folder):
    folder = tokenizer_folder()
    (folder / "tokenizer.model").rename(folder / "sentencepiece.bpe.model")
    assert load_tokenizer(folder).encode(UNICODE) == tokenizer.encode(UNICODE)


def test_a_folder_without_a_tokenizer_is_named_with_the_files_looked_for(tmp_path):
    expected = f"{tmp_path} has no tokenizer: looked for tokenizer.model, sentencepiece.bpe.model, tokenizer.json"
    with pytest.raises(TokenizerError, match=expected):
        load_tokenizer(tmp_path)


@pytest.mark.parametrize("content", [b"", b"garbage", b"version https://git-lfs.github.com/spec/v1\n"])
def test_a_damaged_file_is_named(tokenizer_folder, content):
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is not a SentencePiece model \(\d+ bytes"):
        load_tokenizer(tokenizer_folder(content))


def test_damaged_configuration_files_are_named(tokenizer_folder):
    folder = tokenizer_folder()
    for content, message in [("{", "is not valid JSON"), ("[]", "holds a list, needs an object")]:
        (folder / "tokenizer_config.json").write_text(content)
        with pytest.raises(TokenizerError, match=rf"tokenizer_config\.json {message}"):
            load_tokenizer(folder)
    (folder / "tokenizer_config.json").write_text('{"added_tokens_decoder": {"400": "x"}}')
    with pytest.raises(TokenizerError, match="describes its added tokens"):
        load_tokenizer(folder)


def test_an_unknown_special_token_is_named(tokenizer_folder):
    with pytest.raises(TokenizerError, match=r"names '<\|end\|>' as its eos_token"):
        load_tokenizer(tokenizer_folder(tokenizer_config={"eos_token": "<|end|>"}))


@pytest.mark.parametrize("name", ["./missing", "/missing/model", "~/missing", "missing", "a/b/c", "../x"])
def test_what_looks_like_a_path_never_reaches_the_network(name, monkeypatch):
    monkeypatch.setattr(tokenizer_module, "_paddlenlp_sentencepiece_file", lambda name: pytest.fail("asked PaddleNLP"))
    with pytest.raises(
        TokenizerError, match=r"does not exist: give a folder with a tokenizer\.model, or a remote model"
    ):
        load_tokenizer(name)


def test_a_file_is_not_a_folder(tokenizer_folder):
    with pytest.raises(TokenizerError, match=r"tokenizer\.model is a file: give the folder"):
        load_tokenizer(tokenizer_folder() / "tokenizer.model")


def test_a_remote_name_is_read_through_paddlenlp(tokenizer_folder, tokenizer, monkeypatch):
    """PaddleNLP is asked for the name; that it then downloads is its own affair, so the folder stands in for it."""
    folder = tokenizer_folder(tokenizer_config={"tokenizer_class": "LlamaTokenizer"})
    (folder / "tokenizer.model").rename(folder / "sentencepiece.bpe.model")
    find = tokenizer_module._paddlenlp_sentencepiece_file
    monkeypatch.setattr(tokenizer_module, "_paddlenlp_sentencepiece_file", lambda name: find(str(folder)))
    remote = load_tokenizer("mistralai/Mixtral-8x7B-v0.1")
    assert isinstance(remote, Tokenizer)
    assert remote.encode(UNICODE) == tokenizer.encode(UNICODE)


@pytest.mark.parametrize("tokenizer_class", ["LlamaTokenizer", "LlamaTokenizerFast", "PreTrainedTokenizerFast"])
def test_paddlenlp_cannot_read_a_tokenizer_json_which_is_why_it_is_not_asked_to(tmp_path, tokenizer_class):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"type": "BPE", "vocab": {}, "merges": []}}))
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": tokenizer_class}))
    with pytest.raises(TokenizerError, match="PaddleNLP cannot load"):
        tokenizer_module._paddlenlp_sentencepiece_file(str(tmp_path))


def test_a_folder_is_read_without_paddle(tokenizer_folder):
    program = (
        "import sys; from predict.model.tokenizer import load_tokenizer; load_tokenizer(sys.argv[1]).encode('the');"
        "assert not {'paddle', 'paddlenlp', 'jinja2'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", program, str(tokenizer_folder())], check=True)
