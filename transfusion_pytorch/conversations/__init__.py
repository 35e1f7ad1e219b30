"""Conversations: tokenizers with chat templates, messages with images, as samples and as answers of a model."""

from transfusion_pytorch.conversations.chat import ChatMethods
from transfusion_pytorch.conversations.clean_context import CleanContext
from transfusion_pytorch.conversations.datasets import (
    CaptionConversations,
    ConversationDataset,
    EditTriples,
    LlavaConversations,
    OpenAIConversations,
)
from transfusion_pytorch.conversations.dropout import ConditionDropout
from transfusion_pytorch.conversations.format import ConversationFormat
from transfusion_pytorch.conversations.templates import LLAMA2_TEMPLATE, PLAIN_TEMPLATE, VICUNA_TEMPLATE
from transfusion_pytorch.conversations.tokenizer import ChatTokenizer

__all__ = [
    "LLAMA2_TEMPLATE",
    "PLAIN_TEMPLATE",
    "VICUNA_TEMPLATE",
    "CaptionConversations",
    "ChatMethods",
    "ChatTokenizer",
    "CleanContext",
    "ConditionDropout",
    "ConversationDataset",
    "ConversationFormat",
    "EditTriples",
    "LlavaConversations",
    "OpenAIConversations",
]
