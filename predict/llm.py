"""The Python API: LLM(model).generate(prompts, SamplingParams(...)), .chat(messages), and both as streams."""

import itertools
import sys
from collections import deque
from collections.abc import Iterable, Iterator
from collections.abc import Sequence as Seq
from numbers import Integral
from pathlib import Path
from typing import cast

from ops import library
from ops.device import device_memory, device_name, device_number, gpu_place, is_cuda, ranks_sharing
from ops.gpu_group import join_gpus
from predict.artifact import Artifact, ArtifactError, refuse_artifact
from predict.cache_size import cache_blocks, free_memory
from predict.completion import Collector, Completion
from predict.engine.engine import DEFAULT_MAX_NUM_BATCHED_TOKENS, DEFAULT_MAX_NUM_SEQS, Delta, Engine, Runner
from predict.engine.request import SamplingParams
from predict.model.chat import ChatTemplate, load_chat_template
from predict.model.config import MixtralConfig, positive
from predict.model.source import ModelSource, find_model
from predict.model.tokenizer import IncrementalDetokenizer, Tokenizer, load_tokenizer
from predict.model.weights import load
from predict.parallel import Ranks, alone, barrier, least
from predict.runner import DynamicRunner, StaticRunner, bytes_per_token

DEFAULT_BLOCK_SIZE = 64
DEFAULT_TOTAL_MAX_LENGTH = 4096
GREEDY = SamplingParams()
Message = dict[str, str]


class LLM:
    """A Mixtral ready to generate, from a checkpoint (dynamic) or an exported folder (static).

    Args:
        model: checkpoint folder, exported folder, "dummy:CONFIG", or the name of a remote model.
        mode: "dynamic" or "static"; by default what the folder is.
        dtype: "bfloat16", "float32" (on the CPU) or "float16" (on a GPU); by default the checkpoint's own, or what was
            exported.
        quant_type: "weight_only_int8", "a8w8" (the same weights, activations in 8 bits: faster, less exact) or None.
        max_num_seqs: sequences that run together at the most; the others wait.
        max_num_batched_tokens: new tokens a step computes at the most.
        kv_cache_memory: bytes of each rank's KV cache; by default half of the memory that is free, or less where
            max_num_seqs sequences of total_max_length tokens cannot use it. It is only touched as tokens need it.
        prefix_caching: find the beginning of a prompt in the cache of earlier ones.
        total_max_length: tokens of a sequence at the most, prompt included.
        block_size: tokens in a page of the KV cache; an exported folder has its own.
        threads: threads of this rank's kernels; results do not depend on it.
        chat_template: see predict.model.chat.load_chat_template; by default the checkpoint's own.
        verify: hash the files of an exported folder before using them.
        num_hidden_layers: layers of a dummy model.
        device: "cpu" or "gpu"; ranks share the GPUs out among themselves.
        ranks: this process among the ranks of a job (predict.parallel.join()); by default it is alone. Every rank makes
            the same calls, or all but the first are in predict.followers.follow.

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
        max_num_seqs: int = DEFAULT_MAX_NUM_SEQS,
        max_num_batched_tokens: int = DEFAULT_MAX_NUM_BATCHED_TOKENS,
        kv_cache_memory: int | None = None,
        prefix_caching: bool = True,
        total_max_length: int | None = None,
        block_size: int | None = None,
        threads: int | None = None,
        chat_template: str | None = None,
        verify: bool = False,
        num_hidden_layers: int | None = None,
        device: str = "cpu",
        ranks: Ranks | None = None,
    ):
        if mode not in (None, "dynamic", "static"):
            raise ValueError(f"mode is {mode!r}, needs 'dynamic' or 'static'")
        if device not in ("cpu", "gpu"):
            raise ValueError(f"device is {device!r}, needs 'cpu' or 'gpu'")
        ranks = ranks or alone()
        self.place = gpu_place(ranks.rank) if device == "gpu" else None
        if self.place is not None and ranks.world_size > 1 and is_cuda(self.place):
            way = join_gpus(device_number(self.place))
            if way and ranks.rank == 0:
                print(way, file=sys.stderr)
        library.set_num_threads(ranks.local_threads if threads is None else threads)
        self.ranks, self.chat_template = ranks, chat_template
        self.max_num_seqs = positive("max_num_seqs", max_num_seqs)
        self.max_num_batched_tokens = positive("max_num_batched_tokens", max_num_batched_tokens)
        self.kv_cache_memory = None if kv_cache_memory is None else positive("kv_cache_memory", kv_cache_memory)
        self.prefix_caching = prefix_caching
        self._calls = itertools.count()
        # Streams may be open at the same time: a step of one brings tokens of the others.
        self._inboxes: dict[str, tuple[int, deque[tuple[int, Delta]]]] = {}
        self._chat_template: ChatTemplate | None = None
        static = Artifact.is_artifact(model) if mode is None else mode == "static"
        if static:
            self._open_artifact(
                *(Artifact.open(model), dtype, quant_type, block_size, device),
                *(verify, total_max_length, num_hidden_layers),
            )
        else:
            if verify:
                raise ValueError(
                    "verify is for exported folders (mode static): a checkpoint carries no hashes to check"
                )
            refuse_artifact(model)
            source = find_model(model, num_hidden_layers)
            self._open_checkpoint(source, source.dtype(dtype, device), quant_type, block_size, total_max_length)
        self.engine = self.new_engine(self.runner)

    def new_engine(self, runner: Runner) -> Engine:
        """An engine of this model's and this LLM's settings, on its runner or on one that wraps it."""
        return Engine(
            runner,
            self.tokenizer.eos_token_ids or self.config.eos_token_id,
            self.total_max_length,
            max_num_batched_tokens=self.max_num_batched_tokens,
            max_num_seqs=self.max_num_seqs,
            prefix_caching=self.prefix_caching,
            new_detokenizer=lambda prompt_ids: IncrementalDetokenizer(self.tokenizer, prompt_ids),
        )

    def _open_artifact(
        self, artifact, dtype, quant_type, block_size, device, verify, total_max_length, num_hidden_layers
    ) -> None:
        if num_hidden_layers is not None:
            raise ValueError(
                "num_hidden_layers is for dummy models; an exported folder has the layers it was exported with"
            )
        artifact.require(dtype, quant_type, self.ranks.world_size, block_size, device)
        if verify:
            artifact.verify(self.ranks.rank == 0)
        self.dtype, self.quant_type = artifact.dtype, artifact.quant_type
        self._prepare(artifact.config, artifact.folder, total_max_length)
        program = artifact.program(self.ranks.rank)
        weights = sum(e["bytes"] for name, e in artifact.files.items() if name.startswith(f"{program.parent.name}/"))
        num_blocks = self._num_blocks(artifact.block_size, weights)
        try:
            self.runner: StaticRunner | DynamicRunner = StaticRunner(
                program,
                artifact.config,
                artifact.world_size,
                artifact.dtype,
                num_blocks,
                artifact.block_size,
                self.ranks.rank == 0,
                self.place,
            )
        except RuntimeError as error:
            reason = str(error).strip().partition("\n")[0]
            raise ArtifactError(
                f"{program}: Paddle cannot load the program ({reason}); look for changed bytes with --verify, "
                "or export it again"
            ) from error

    def _open_checkpoint(self, source: ModelSource, dtype, quant_type, block_size, total_max_length) -> None:
        self.dtype, self.quant_type = dtype, quant_type
        block_size = positive("block_size", DEFAULT_BLOCK_SIZE if block_size is None else block_size)
        self._prepare(source.config, source.tokenizer_folder, total_max_length)
        rank, world_size = self.ranks.rank, self.ranks.world_size
        network = load(source.config, source.weights(), self.dtype, quant_type, rank, world_size, self.place)
        self.runner = DynamicRunner(network, self._num_blocks(block_size, 0), block_size)

    def _prepare(self, config: MixtralConfig, tokenizer_folder: Path, total_max_length: int | None) -> None:
        """What both modes share: the tokenizer, and how long a sequence may be."""
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

    def _num_blocks(self, block_size: int, weights_to_load: int) -> int:
        """Pages of the KV cache, the same on every rank; says on stderr what it is."""
        world_size = self.ranks.world_size
        if world_size > 1:
            barrier()  # all have loaded what they load before
        per_token = bytes_per_token(self.config, world_size, self.dtype)
        if self.place is None:
            free, sharing = free_memory(), world_size
        else:
            free, sharing = device_memory(self.place)[1], ranks_sharing(self.place, world_size)
        free = max(0, free // sharing - weights_to_load)
        num_blocks = least(
            cache_blocks(self.kv_cache_memory, free, block_size, per_token, self.max_num_seqs, self.total_max_length)
        )
        if self.ranks.rank == 0:
            tokens = num_blocks * block_size
            print(
                f"KV cache: {tokens} tokens in {num_blocks} pages of {block_size}, {tokens * per_token / 1e9:.3f} GB",
                file=sys.stderr,
            )
        return num_blocks

    @property
    def mode(self) -> str:
        return self.runner.mode

    @property
    def description(self) -> str:
        """What runs, and on what, in a line."""
        quantised = f" {self.quant_type}" if self.quant_type else ""
        ranks = f"{self.ranks.world_size} rank(s) of {library.num_threads()} thread(s)"
        kernels = library.cpu_isa() if self.place is None else device_name(self.place)
        return f"{self.mode} {self.dtype}{quantised}, {ranks}, {kernels}"

    def generate(
        self,
        prompts: str | Seq[str] | Seq[Seq[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Continues each prompt.

        Args:
            prompts: a text, texts, or lists of token ids.
            sampling_params: one for all, or one for each; greedy by default.

        Returns:
            The n samples of the first prompt, those of the second, and so on.

        Raises:
            ValueError: a prompt is empty, too long, or holds a token outside the vocabulary; names the prompt.
        """
        return self.complete(self._encode(prompts), sampling_params)

    def chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answers one conversation, or several; each a list of {"role": ..., "content": ...}.

        Returns:
            As :meth:`generate`.

        Raises:
            ValueError: roles or content the template refuses; says which message.
        """
        return self.complete(self._encode_chats(messages), sampling_params, chat=True)

    def stream(
        self,
        prompts: str | Seq[str] | Seq[Seq[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """As :meth:`generate`, but yields (number of the prompt, Delta) as tokens come; what is left when the caller
        stops listening is aborted."""
        return self.stream_tokens(self._encode(prompts), sampling_params)

    def stream_chat(
        self,
        messages: Seq[Message] | Seq[Seq[Message]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> Iterator[tuple[int, Delta]]:
        """As :meth:`chat`, but yields as :meth:`stream` does."""
        return self.stream_tokens(self._encode_chats(messages), sampling_params, chat=True)

    def encode_chat(self, messages: Seq[Message]) -> list[int]:
        """Token ids of a conversation, ready for its answer, by the chat template this LLM was made with."""
        if self._chat_template is None:
            self._chat_template = load_chat_template(self.tokenizer, self.chat_template)
        return self._chat_template.apply(list(messages))

    def score(self, token_ids: list[int]) -> list[float]:
        """The log-probability of each token but the first, given those before it."""
        self.check_prompt(0, token_ids, SamplingParams(max_tokens=1))
        return self.engine.score(token_ids)

    def complete(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        chat: bool = False,
    ) -> list[Completion]:
        """Continues prompts that are token ids; ``chat`` drops the leading space of the text, which answers a chat."""
        params = _for_each(sampling_params, len(prompts))
        samples = [
            [Collector(prompt, index) for index in range(p.n)] for prompt, p in zip(prompts, params, strict=True)
        ]
        for i, delta in self.stream_tokens(prompts, params, chat):
            samples[i][delta.index].add(delta)
        return [collector.completion() for of_prompt in samples for collector in of_prompt]

    def stream_tokens(
        self,
        prompts: list[list[int]],
        sampling_params: SamplingParams | Seq[SamplingParams] | None = None,
        chat: bool = False,
    ) -> Iterator[tuple[int, Delta]]:
        """As :meth:`complete`, but yields as :meth:`stream` does. Every prompt is checked before any runs."""
        params = _for_each(sampling_params, len(prompts))
        for i, (prompt, p) in enumerate(zip(prompts, params, strict=True)):
            self.check_prompt(i, prompt, p)
        return self._listen(prompts, params, chat)

    def _listen(
        self, prompts: list[list[int]], params: list[SamplingParams], chat: bool
    ) -> Iterator[tuple[int, Delta]]:
        call, inbox = next(self._calls), deque[tuple[int, Delta]]()
        mine = {f"{call}-{i}": i for i in range(len(prompts))}
        try:
            for (request_id, i), prompt, p in zip(mine.items(), prompts, params, strict=True):
                self.engine.add(request_id, prompt, p, chat=chat)
                self._inboxes[request_id] = (i, inbox)
            unfinished = sum(p.n for p in params)
            while unfinished:
                for delta in self.engine.step():
                    if delta.request_id in self._inboxes:  # else its listener has left
                        i, of_its_stream = self._inboxes[delta.request_id]
                        of_its_stream.append((i, delta))
                while inbox:
                    unfinished -= inbox[0][1].finish_reason is not None
                    yield inbox.popleft()
        finally:
            for request_id in mine:
                self._inboxes.pop(request_id, None)
                self.engine.abort(request_id)

    def check_prompt(self, i: int, prompt: list[int], params: SamplingParams = GREEDY) -> None:
        """Refuses prompt number ``i`` if it cannot be continued.

        Raises:
            ValueError: as predict.engine.engine.Engine.check does; names the prompt.
        """
        try:
            self.engine.check(prompt, params)
        except ValueError as error:
            raise ValueError(f"prompt {i}: {error}") from error

    def _encode(self, prompts: str | Seq[str] | Seq[Seq[int]]) -> list[list[int]]:
        given: list[str | Seq[int]] = [prompts] if isinstance(prompts, str) else list(prompts)
        return [self.tokenizer.encode(p) if isinstance(p, str) else _token_ids(i, p) for i, p in enumerate(given)]

    def _encode_chats(self, messages: Seq[Message] | Seq[Seq[Message]]) -> list[list[int]]:
        one = bool(messages) and isinstance(messages[0], dict)
        conversations = cast(Seq[Seq[Message]], [messages] if one else messages)
        return [self.encode_chat(c) for c in conversations]


def _for_each(sampling_params: SamplingParams | Seq[SamplingParams] | None, count: int) -> list[SamplingParams]:
    if sampling_params is None or isinstance(sampling_params, SamplingParams):
        return [sampling_params or GREEDY] * count
    params = list(sampling_params)
    if len(params) != count:
        raise ValueError(f"{len(params)} sampling_params for {count} prompts; give one, or one for each prompt")
    return params


def _token_ids(i: int, prompt: Seq[int]) -> list[int]:
    if not isinstance(prompt, Iterable) or not all(isinstance(t, Integral) for t in prompt):
        raise ValueError(f"prompt {i} is {prompt!r:.80}, needs a text or a list of token ids")
    return [int(token) for token in prompt]
