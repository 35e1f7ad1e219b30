"""`model.chat(messages)`: OpenAI-style messages in, an answer of text and pictures out."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from transfusion_pytorch.conversations.format import ConversationFormat
from transfusion_pytorch.conversations.messages import Messages, errors_named
from transfusion_pytorch.data.images import ImageReader
from transfusion_pytorch.data.model_images import has_channels_first, image_reader_of
from transfusion_pytorch.generation.engine import MAX_BATCH
from transfusion_pytorch.generation.options import (
    SamplingKeywords,
    SamplingOptions,
    as_options,
    checks_itself,
    takes_sampling_options,
)
from transfusion_pytorch.sequence.checks import check_type

if TYPE_CHECKING:
    from typing_extensions import Unpack

MOST_TOKENS = 1024  # of an answer
UNBOUNDED = 2**31  # tokens of a conversation: how many a model takes is known to its user


class ChatMethods:
    """What a model with a chat template offers. Mixed into `Transfusion`."""

    # needed of the model
    vocabulary: Any
    modalities: Any
    tokenizer: Any

    def conversation_format(self, **options: Any) -> ConversationFormat:
        """The `ConversationFormat` of this model: its tokenizer, and images as its modalities take them, where those
        say how. `options` are the fields of the format; by default

        - `modality_type`: the first modality that can be drawn
        - `vision_type`: the first that is only read, of a `VisionEncoder`; None (also if you say so) for without
        - `images`, `vision_images`: what the encoders of these say. Where the vision encoder does not say how large
          its images are, they are read as large as the others, channels first

        Raises `ValueError` for a model without a tokenizer, and for types that it does not have.
        """
        tokenizer = options.pop("tokenizer", self.tokenizer)
        if tokenizer is None:
            raise ValueError(
                "the model has no tokenizer, so it cannot chat: set model.tokenizer to a ChatTokenizer, or save it "
                "with one (save_pretrained(folder, tokenizer=...))"
            )
        types = {is_read_only: [] for is_read_only in (False, True)}
        for io in self.modalities:
            types[io.is_read_only].append(io.spec.type)
        kind = options.setdefault("modality_type", next(iter(types[False]), 0))
        vision = options.setdefault("vision_type", next((each for each in types[True] if each != kind), None))
        for name, each in (("modality_type", kind), ("vision_type", vision)):
            if each is not None:
                check_type(each, len(self.modalities), name)
        options.setdefault("images", image_reader_of(self.modalities[kind]))
        if vision is not None:
            reader = image_reader_of(self.modalities[vision]) or _as_large_as(options["images"])
            options.setdefault("vision_images", reader)
        return ConversationFormat(tokenizer, **options)

    @takes_sampling_options
    @checks_itself
    def chat(
        self,
        messages: Messages,
        *,
        format: ConversationFormat | None = None,
        cache_kv: bool = True,
        progress: bool = False,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> dict[str, Any]:
        """Answers a conversation: `{"role": "assistant", "content": [...]}`, with `{"type": "text", "text": ...}` for
        what it writes, `{"type": "image", "image": <Pillow image>}` for pictures that it draws, and
        `{"type": "modality", "modality_type": ..., "data": ...}` for other modalities. Append it to the messages, add
        the next one of the user, and call again: its pictures are then read.

        `messages` are those of OpenAI, with images as paths, data URLs, Pillow images or tensors; see
        `conversations.messages`. `format` says how they are read, by default `conversation_format()`. The answer ends
        where the template ends a turn, after `max_new_tokens`, at `max_length` tokens with the conversation (without
        either after 1,024), or at one of the `stop_ids`. The rest is as in `sample`.

        Raises `ValueError`, `TypeError` or `FileNotFoundError` that names the message and the part at fault, also for a
        broken image.
        """
        given: dict[str, Any] = dict(format=format, cache_kv=cache_kv, progress=progress)
        return self._answers([messages], options, keywords, **given)[0]

    @takes_sampling_options
    @checks_itself
    def chat_many(
        self,
        conversations: Sequence[Messages],
        *,
        format: ConversationFormat | None = None,
        max_batch: int = MAX_BATCH,
        cache_kv: bool = True,
        progress: bool = False,
        options: SamplingOptions | None = None,
        **keywords: "Unpack[SamplingKeywords]",
    ) -> list[dict[str, Any]]:
        """Answers any number of conversations, up to `max_batch` of them at once, each as `chat` does. Errors name the
        conversation too.
        """
        given: dict[str, Any] = dict(format=format, cache_kv=cache_kv, progress=progress)
        return self._answers(conversations, options, keywords, max_batch=max_batch, **given)

    def _answers(
        self,
        conversations: Sequence[Messages],
        options: SamplingOptions | None,
        keywords: Any,
        *,
        format: ConversationFormat | None,
        **batching: Any,
    ) -> list[dict[str, Any]]:
        if not conversations:
            raise ValueError("there are no conversations to answer")
        if format is not None and not isinstance(format, ConversationFormat):
            raise TypeError(f"format is a ConversationFormat, got {type(format).__name__}")
        model: Any = self
        format = self.conversation_format() if format is None else format
        given = as_options(options, keywords)
        prompts = [_prompt_of(format, conversations, i) for i in range(len(conversations))]
        keywords["stop_ids"] = [*given.stop_ids, *(id for id in format.stop_ids if id not in given.stop_ids)]
        has_length = "max_length" in keywords or given.max_length != SamplingOptions.max_length
        if not has_length:
            new = MOST_TOKENS if given.max_new_tokens is None else given.max_new_tokens
            keywords |= dict(max_length=UNBOUNDED, max_new_tokens=new)
        samples = model.sample_many(prompts, options=options, **batching, **keywords)
        has_first = {io.spec.type: has_channels_first(io) for io in self.modalities}
        return [
            format.message_of(sample, num_text=self.vocabulary.num_text, prompt=prompt, channels_first=has_first)
            for sample, prompt in zip(samples, prompts, strict=True)
        ]


def _as_large_as(images: ImageReader | int | None) -> ImageReader | None:
    """Reads images of this size for an encoder, which takes them as `(3, h, w)`."""
    if images is None:
        return None
    return ImageReader(images.size if isinstance(images, ImageReader) else images, channels_first=True)


def _prompt_of(format: ConversationFormat, conversations: Sequence[Messages], index: int) -> list[Any]:
    if len(conversations) == 1:
        return format.prompt_of(conversations[0])
    with errors_named(f"conversation {index}"):
        return format.prompt_of(conversations[index])
