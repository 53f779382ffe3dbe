"""The Python API: LLM(model).generate(prompts, SamplingParams(...)) and .chat(messages)."""

from collections.abc import Callable, Iterable
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from numbers import Integral
from pathlib import Path
from typing import cast

from ops import library
from predict.artifact import Artifact, ArtifactError, refuse_artifact
from predict.engine.engine import Engine, batches
from predict.engine.request import SamplingParams, Sequence
from predict.model.chat import ChatTemplate, load_chat_template
from predict.model.config import MixtralConfig, positive
from predict.model.source import ModelSource, find_model
from predict.model.tokenizer import Tokenizer, load_tokenizer
from predict.model.weights import load
from predict.parallel import Ranks, alone
from predict.runner import DynamicRunner, StaticRunner

DEFAULT_BLOCK_SIZE = 64
DEFAULT_TOTAL_MAX_LENGTH = 4096
Message = dict[str, str]


@dataclass(frozen=True)
class Completion:
    """What became of one prompt.

    Attributes:
        prompt_token_ids: the prompt as the model saw it.
        text: what the generated tokens add to the prompt.
        token_ids, logprobs: generated tokens, the end-of-sequence token included, and their log-probabilities.
        finish_reason: "stop" (end of sequence) or "length" (max_tokens, or the total length, was reached).
    """

    prompt_token_ids: list[int]
    text: str
    token_ids: list[int]
    logprobs: list[float]
    finish_reason: str


class LLM:
    """A Mixtral ready to generate, from a checkpoint (dynamic) or an exported folder (static).

    Args:
        model: checkpoint folder, exported folder, "dummy:CONFIG", or the name of a remote model.
        mode: "dynamic" or "static"; by default what the folder is.
        dtype: "bfloat16" or "float32"; by default the checkpoint's own, or what was exported.
        quant_type: "weight_only_int8" or None.
        batch_size: sequences that run together at the most.
        total_max_length: tokens of a sequence at the most, prompt included.
        block_size: tokens in a page of the KV cache; an exported folder has its own.
        threads: threads of this rank's kernels; results do not depend on it.
        chat_template: see predict.model.chat.load_chat_template; by default the checkpoint's own.
        verify: hash the files of an exported folder before using them.
        num_hidden_layers: layers of a dummy model.
        ranks: this process among the ranks of a job (predict.parallel.join()); by default it is alone.

    Raises:
        ValueError: (and its subclasses) anything that does not fit; one sentence with a way out.
    """

    def __init__(
        self,
        model: str | Path,
        *,
        mode: str | None = None,
        dtype: str | None = None,
        quant_type: str | None = None,
        batch_size: int = 8,
        total_max_length: int | None = None,
        block_size: int | None = None,
        threads: int | None = None,
        chat_template: str | None = None,
        verify: bool = False,
        num_hidden_layers: int | None = None,
        ranks: Ranks | None = None,
    ):
        if mode not in (None, "dynamic", "static"):
            raise ValueError(f"mode is {mode!r}, needs 'dynamic' or 'static'")
        ranks = ranks or alone()
        library.set_num_threads(ranks.local_threads if threads is None else threads)
        self.ranks, self.batch_size, self.chat_template = ranks, positive("batch_size", batch_size), chat_template
        self._chat_template: ChatTemplate | None = None
        static = Artifact.is_artifact(model) if mode is None else mode == "static"
        if static:
            self._open_artifact(
                Artifact.open(model), dtype, quant_type, block_size, verify, total_max_length, num_hidden_layers
            )
        else:
            if verify:
                raise ValueError(
                    "verify is for exported folders (mode static): a checkpoint carries no hashes to check"
                )
            refuse_artifact(model)
            source = find_model(model, num_hidden_layers)
            self._open_checkpoint(source, dtype, quant_type, block_size, total_max_length)
        self.engine = Engine(
            self.runner, self.tokenizer.eos_token_ids or self.config.eos_token_id, self.total_max_length
        )

    def _open_artifact(
        self, artifact, dtype, quant_type, block_size, verify, total_max_length, num_hidden_layers
    ) -> None:
        if num_hidden_layers is not None:
            raise ValueError(
                "num_hidden_layers is for dummy models; an exported folder has the layers it was exported with"
            )
        artifact.require(dtype, quant_type, self.ranks.world_size, block_size)
        if verify:
            artifact.verify(self.ranks.rank == 0)
        self.dtype, self.quant_type = artifact.dtype, artifact.quant_type
        self._prepare(artifact.config, artifact.folder, total_max_length, artifact.block_size)
        program = artifact.program(self.ranks.rank)
        try:
            self.runner: StaticRunner | DynamicRunner = StaticRunner(
                program,
                artifact.config,
                artifact.world_size,
                artifact.dtype,
                self.num_blocks,
                artifact.block_size,
                self.ranks.rank == 0,
            )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"{program}: Paddle cannot load the program ({reason}); look for changed bytes with --verify, "
                "or export it again"
            ) from error

    def _open_checkpoint(self, source: ModelSource, dtype, quant_type, block_size, total_max_length) -> None:
        self.dtype, self.quant_type = dtype or source.default_dtype(), quant_type
        block_size = positive("block_size", DEFAULT_BLOCK_SIZE if block_size is None else block_size)
        self._prepare(source.config, source.tokenizer_folder, total_max_length, block_size)
        network = load(source.config, source.weights(), self.dtype, quant_type, self.ranks.rank, self.ranks.world_size)
        self.runner = DynamicRunner(network, self.num_blocks, block_size)

    def _prepare(
        self, config: MixtralConfig, tokenizer_folder: Path, total_max_length: int | None, block_size: int
    ) -> None:
        """What both modes share: the tokenizer, the ids that end a sequence, the size of the cache."""
        longest = config.max_position_embeddings
        if total_max_length is not None and not 2 <= total_max_length <= longest:
            raise ValueError(
                f"total_max_length (src_length + max_length unless given) is {total_max_length}, needs 2 to {longest}, "
                "the model's max_position_embeddings; lower it, or src_length and max_length"
            )
        self.config = config
        self.total_max_length = total_max_length or min(DEFAULT_TOTAL_MAX_LENGTH, longest)
        self.tokenizer: Tokenizer = load_tokenizer(tokenizer_folder)
        if self.tokenizer.vocab_size > config.vocab_size:
            raise ValueError(
                f"{self.tokenizer.folder}: the tokenizer has {self.tokenizer.vocab_size} tokens, the model "
                f"{config.vocab_size}; they do not belong together"
            )
        if self.chat_template is not None:  # a bad one is found before the weights are loaded
            self._chat_template = load_chat_template(self.tokenizer, self.chat_template)
        self.num_blocks = self.batch_size * -(-self.total_max_length // block_size)

    @property
    def mode(self) -> str:
        return self.runner.mode

    def generate(
        self,
        prompts: str | Seq[str] | Seq[Seq[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
            prompts: a text, texts, or lists of token ids.
            sampling_params: one for all, or one for each; greedy by default.
            on_token: called with (index of the prompt, token id) as tokens come.

        Raises:
            ValueError: a prompt is empty, too long, or holds a token outside the vocabulary; names the prompt.
        """
        given: list[str | Seq[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        ids = [self.tokenizer.encode(p) if isinstance(p, str) else _token_ids(i, p) for i, p in enumerate(given)]
        return self.complete(ids, sampling_params, on_token)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        on_token: Callable[[int, int], None] | None = None,
    ) -> list[Completion]:
        """Answers one conversation, or several; each a list of {"role": ..., "content": ...}.

        Raises:
            ValueError: roles or content the template refuses; says which message.
        """
        one = bool(messages) and isinstance(messages[0], dict)
        conversations = cast(Seq[Seq[Message]], [messages] if one else messages)
        return self.complete([self.encode_chat(c) for c in conversations], sampling_params, on_token, chat=True)

    def encode_chat(self, messages: Seq[Message]) -> list[int]:
        """Token ids of a conversation, ready for its answer, by the chat template this LLM was made with."""
        if self._chat_template is None:
            self._chat_template = load_chat_template(self.tokenizer, self.chat_template)
        return self._chat_template.apply(list(messages))

    def score(self, token_ids: list[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        self.check_prompt(0, token_ids)
        sequence = Sequence(list(token_ids), SamplingParams())
        self.engine.score(sequence)
        return sequence.logprobs

    def complete(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        on_token: Callable[[int, int], None] | None = None,
        chat: bool = False,
    ) -> list[Completion]:
        """Continues prompts that are token ids; ``chat`` drops the leading space of the text, which answers a chat."""
        if sampling_params is None or isinstance(sampling_params, SamplingParams):
            params = [sampling_params or SamplingParams()] * len(prompts)
        else:
            params = list(sampling_params)
        if len(params) != len(prompts):
            raise ValueError(
                f"{len(params)} sampling_params for {len(prompts)} prompts; give one, or one for each prompt"
            )
        for i, prompt in enumerate(prompts):
            self.check_prompt(i, prompt)
        sequences = [Sequence(list(p), s) for p, s in zip(prompts, params, strict=True)]
        index = {id(s): i for i, s in enumerate(sequences)}
        for batch in batches(sequences, self.batch_size):
            if on_token is None:
                self.engine.generate(batch)
            else:
                self.engine.generate(batch, lambda sequence, token: on_token(index[id(sequence)], token))
        return [self._completion(s, chat) for s in sequences]

    def check_prompt(self, i: int, prompt: list[int]) -> None:
        """Refuses prompt number ``i`` if it cannot be continued.

        Raises:
            ValueError: it is empty, too long, or holds a token outside the vocabulary.
        """
        if not prompt:
            raise ValueError(f"prompt {i} is empty; needs at least one token")
        if len(prompt) >= self.total_max_length:
            raise ValueError(
                f"prompt {i} has {len(prompt)} tokens, total_max_length is {self.total_max_length}: "
                "no room for an answer; shorten it or raise total_max_length"
            )
        for token in prompt:
            if not 0 <= token < self.config.vocab_size:
                raise ValueError(f"prompt {i} holds token {token}, needs ids from 0 to {self.config.vocab_size - 1}")

    def _completion(self, sequence: Sequence, chat: bool) -> Completion:
        prompt, output = sequence.token_ids[: sequence.prompt_len], sequence.output_ids
        # An answer is a text of its own; a continuation keeps the space its first word begins with.
        text = self.tokenizer.continuation([] if chat else prompt, output)
        return Completion(prompt, text, output, sequence.logprobs, sequence.finish_reason or "length")


def _token_ids(i: int, prompt: Seq[int]) -> list[int]:
    if not isinstance(prompt, Iterable) or not all(isinstance(t, Integral) for t in prompt):
        raise ValueError(f"prompt {i} is {prompt!r:.80}, needs a text or a list of token ids")
    return [int(token) for token in prompt]
