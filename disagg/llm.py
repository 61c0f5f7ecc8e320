"""Offline use: one engine in this process, no servers.

llm = LLM("HuggingFaceTB/SmolLM2-135M-Instruct", dtype="float32")
for completion in llm.generate(["The capital of France is"], SamplingParams(max_tokens=8)):
    print(completion.text)
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from collections.abc import Sequence as Seq
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any, Self

from msgspec import Struct, ValidationError, convert
from msgspec.structs import replace

from disagg.config import EngineConfig, ModelConfig, leaves
from disagg.engine import EngineRequest, Refused, SequenceOutput
from disagg.engine.admission import refuse
from disagg.engine.build import load_rank, make_engine
from disagg.errors import ConfigError, InvalidRequest, PromptTooLong
from disagg.frontend.chat_template import ChatTemplate
from disagg.frontend.tokenizer import Tokenizer
from disagg.protocol import FinishReason, SamplingParams

Prompt = str | Seq[int]
"""Text, or token ids."""
Messages = Seq[Mapping[str, Any]]
"""One conversation: `[{"role": "user", "content": "…"}]`."""


class Completion(Struct, frozen=True, kw_only=True):
    """What followed one prompt."""

    prompt_token_ids: list[int]
    token_ids: list[int]
    """The end token included, where there is one."""
    text: str
    """Without special tokens."""
    finish_reason: FinishReason
    cached_tokens: int
    """Prompt tokens whose KV was there already."""


class Progress(Struct, frozen=True):
    """New tokens of one prompt of a running call."""

    index: int
    token_ids: list[int]
    finish_reason: FinishReason | None
    cached_tokens: int | None
    """With the first tokens."""


class LLM:
    """A model, loaded. One thread at a time; a call runs its prompts together and returns at the end."""

    def __init__(
        self,
        model: str = ModelConfig().model,
        *,
        progress: Callable[[int, int], None] | None = None,
        **options: Any,
    ) -> None:
        """Load a model.

        Args:
            model: Hugging Face id, a directory of safetensors, or a .gguf file.
            progress: Told (bytes placed, bytes in all) while weights load.
            options: Any other field of `ModelConfig` and `EngineConfig`, by name.

        Raises:
            ConfigError: an option is unknown or out of range, or the model cannot be loaded so.
        """
        _check_known(options)
        model_config = _configure(ModelConfig, {**options, "model": model})
        self._open(model_config, _configure(EngineConfig, options), progress)

    @classmethod
    def from_config(
        cls,
        model: ModelConfig,
        engine: EngineConfig,
        progress: Callable[[int, int], None] | None = None,
    ) -> Self:
        """Load what a configuration says. Raises ConfigError as the constructor does."""
        llm = cls.__new__(cls)
        llm._open(model, engine, progress)
        return llm

    def _open(
        self, model: ModelConfig, engine: EngineConfig, progress: Callable[[int, int], None] | None
    ) -> None:
        if engine.tensor_parallel_size != 1:
            raise ConfigError(
                f"tensor_parallel_size {engine.tensor_parallel_size} needs one process a rank; "
                "use disagg serve"
            )
        rank = load_rank(model, engine, progress=progress)
        self.spec = rank.spec
        self.engine = make_engine(rank, engine)
        self._path = rank.files.path
        self._template_override = Path(model.chat_template) if model.chat_template else None
        self._numbers = count()

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """The model's; read when text is first used, so that token ids need none."""
        return Tokenizer.from_folder(self._path)

    @cached_property
    def _template(self) -> ChatTemplate | None:
        return ChatTemplate.from_folder(self._path, self._template_override)

    @property
    def max_model_len(self) -> int:
        """Longest prompt plus output."""
        return self.engine.limits.max_model_len

    def generate(
        self,
        prompts: Prompt | Seq[Prompt],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Complete prompts.

        Args:
            prompts: One or several, each text or token ids.
            sampling: One for each prompt, or one for all: then prompt `i` draws as choice
                `choice_index + i`, so that equal prompts go different ways.

        Returns:
            One completion for each prompt, in their order.

        Raises:
            InvalidRequest: a prompt is empty or a parameter out of range. Nothing has run then.
            PromptTooLong: a prompt leaves no room in the context, or needs more KV than there is.
        """
        token_ids = [self.encode(prompt) for prompt in _as_list(prompts)]
        return self._complete(token_ids, _one_each(sampling, len(token_ids)))

    def chat(
        self,
        conversations: Messages | Seq[Messages],
        sampling: SamplingParams | Seq[SamplingParams] | None = None,
    ) -> list[Completion]:
        """Answer conversations through the model's chat template; otherwise as `generate`.

        Raises:
            ConfigError: the model has no chat template.
            InvalidRequest: also where the template refuses the messages.
        """
        several = [conversations] if _is_conversation(conversations) else conversations
        token_ids = [self.encode_chat(messages) for messages in several]  # type: ignore[arg-type]
        return self._complete(token_ids, _one_each(sampling, len(token_ids)))

    def stream(self, prompt: Prompt, sampling: SamplingParams | None = None) -> Iterator[str]:
        """Complete one prompt; yields its text in pieces as they become certain.

        Leaving early stops it. Raises as `generate`.
        """
        detokenizer = self.tokenizer.detokenizer()
        for progress in self.run([(self.encode(prompt), sampling or SamplingParams())]):
            if piece := detokenizer.push(progress.token_ids):
                yield piece
        if piece := detokenizer.flush():
            yield piece

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of one prompt."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, add_special_tokens=True)
        return list(prompt)

    def encode_chat(self, messages: Messages) -> list[int]:
        """Token ids of one conversation, ready for the assistant's turn."""
        if self._template is None:
            raise ConfigError("the model has no chat template; set chat_template")
        text = self._template.render([dict(message) for message in messages])
        return self.tokenizer.encode(text, add_special_tokens=False)

    def run(self, work: Iterable[tuple[list[int], SamplingParams]]) -> Iterator[Progress]:
        """Run prompts of token ids together; yields new tokens of any of them as they come.

        The last one of a prompt has its finish reason. Leaving early aborts the rest. Raises as `generate`.
        """
        requests: list[EngineRequest] = []
        for token_ids, sampling in work:
            request = EngineRequest(
                request_id=f"{next(self._numbers)}",
                token_ids=token_ids,
                num_prompt_tokens=len(token_ids),
                sampling=sampling,
            )
            if (refused := refuse(request, self.engine.limits)) is not None:
                raise _error_of(refused, len(requests))
            requests.append(request)
        return self._run(requests)

    def _run(self, requests: list[EngineRequest]) -> Iterator[Progress]:
        if self.engine.has_work:
            raise RuntimeError(
                "this LLM is in the middle of another call; finish or close its iterator first"
            )
        outputs: list[list[int]] = [[] for _ in requests]
        queue = deque(range(len(requests)))
        running: dict[str, int] = {}
        try:
            while queue or running:
                self._admit(queue, requests, outputs, running)
                step = self.engine.step()
                assert step is not None, "requests wait, and nothing can run"
                for event in step.events:
                    assert isinstance(event, SequenceOutput)
                    index = running[event.request_id]
                    if event.finish_reason is not None:
                        del running[event.request_id]
                    if event.finish_reason == "handed_back":
                        # Out of pages: it goes on from here once others have ended.
                        queue.appendleft(index)
                        continue
                    outputs[index] += event.token_ids
                    yield Progress(index, event.token_ids, event.finish_reason, event.cached_tokens)
        finally:
            for request_id in running:
                self.engine.abort(request_id)
            while self.engine.step() is not None:
                pass  # events of what was aborted, which the next call must not meet

    def _admit(
        self,
        queue: deque[int],
        requests: list[EngineRequest],
        outputs: list[list[int]],
        running: dict[str, int],
    ) -> None:
        """Hand the engine as many requests as it takes, with what they have put out already."""
        while queue:
            request = requests[queue[0]]
            added = self.engine.add(replace(request, token_ids=request.token_ids + outputs[queue[0]]))
            if isinstance(added, Refused):
                assert added.reason == "queue_full", added
                return
            running[request.request_id] = queue.popleft()

    def _complete(self, prompts: list[list[int]], sampling: list[SamplingParams]) -> list[Completion]:
        outputs: list[list[int]] = [[] for _ in prompts]
        cached: dict[int, int] = {}
        reasons: dict[int, FinishReason] = {}
        for progress in self.run(zip(prompts, sampling, strict=True)):
            outputs[progress.index] += progress.token_ids
            if progress.cached_tokens is not None:
                cached.setdefault(progress.index, progress.cached_tokens)  # not a replay's
            if progress.finish_reason is not None:
                reasons[progress.index] = progress.finish_reason
        return [
            Completion(
                prompt_token_ids=prompt,
                token_ids=output,
                text=self.tokenizer.decode(output),
                finish_reason=reasons[i],
                cached_tokens=cached[i],
            )
            for i, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        ]


def _configure(kind: type[Any], options: dict[str, Any]) -> Any:
    """Build one configuration struct of those options that it has."""
    names = {path[-1] for path, _ in leaves(kind)}
    try:
        return convert({name: value for name, value in options.items() if name in names}, kind)
    except ValidationError as error:
        raise ConfigError(f"LLM(): {error}") from error


def _check_known(options: dict[str, Any]) -> None:
    known = {path[-1] for kind in (ModelConfig, EngineConfig) for path, _ in leaves(kind)}
    if unknown := sorted(options.keys() - known):
        raise ConfigError(f"LLM() has no option {unknown[0]!r}; there are {', '.join(sorted(known))}")


def _as_list(prompts: Prompt | Seq[Prompt]) -> list[Prompt]:
    if isinstance(prompts, str):
        return [prompts]
    if prompts and isinstance(prompts[0], int):
        return [prompts]  # type: ignore[list-item]  # one prompt of token ids
    return list(prompts)  # type: ignore[arg-type]


def _is_conversation(conversations: Messages | Seq[Messages]) -> bool:
    return not conversations or isinstance(conversations[0], Mapping)


def _one_each(sampling: SamplingParams | Seq[SamplingParams] | None, n: int) -> list[SamplingParams]:
    if sampling is None:
        sampling = SamplingParams()
    if isinstance(sampling, SamplingParams):
        return [replace(sampling, choice_index=sampling.choice_index + i) for i in range(n)]
    if len(sampling) != n:
        raise InvalidRequest(f"{len(sampling)} sampling parameters for {n} prompts", param="sampling")
    return list(sampling)


def _error_of(refused: Refused, index: int) -> InvalidRequest | PromptTooLong:
    message = f"{refused.detail} (prompt {index})"
    return PromptTooLong(message, "prompt") if refused.reason == "too_long" else InvalidRequest(message)
