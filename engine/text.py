"""Text: the tokenizer and its chat template, the only place where strings become token ids."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, TypeAlias

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from twinhead.engine.batch import Example
from twinhead.engine.rows import kind
from twinhead.engine.templates import PLAIN_TEMPLATE, named

Message = Mapping[str, Any]
Words: TypeAlias = str | Sequence[Message]  # plain text, or a conversation

log = logging.getLogger(__name__)


class Text:
    """A tokenizer that spells prompts and completions the same way in training and in generation.

    Prompt and completion are tokenised separately and then joined, so their border never depends on merges, and the
    prompt ids of a training row are exactly the ids that generation starts from.

    Plain text starts with BOS once if the tokenizer has a BOS token, and a completion ends in EOS once. A conversation
    is what the tokenizer's chat template writes, no more and no less. Three things a tokenizer may lack are recorded
    in it, so that whoever loads the saved tokenizer gets the ids the model was trained on: a pad token (EOS; no mask
    here ever derives from ids), the automatic BOS, and, once a conversation is seen, PLAIN_TEMPLATE. A `template`
    (see templates.named) replaces the one it has, and is recorded in the same way.

    Raises ValueError for a tokenizer without an EOS token: nothing could teach its model to stop.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, template: str = "") -> None:
        if tokenizer.eos_token_id is None:
            raise ValueError(
                "expected a tokenizer with an end-of-sequence token, got none: "
                "set one of its tokens with tokenizer.eos_token = '...' and save it again with save_pretrained"
            )
        self.tokenizer = tokenizer
        self.bos_id: int | None = tokenizer.bos_token_id
        self.eos_id: int = tokenizer.eos_token_id
        if tokenizer.pad_token_id is None:
            tokenizer.pad_token = tokenizer.eos_token
            log.info("the tokenizer has no pad token: saved copies name %s", tokenizer.eos_token)
        if self.bos_id is not None and tokenizer("")["input_ids"][:1] != [self.bos_id]:
            tokenizer.add_bos_token = True
            log.info("the tokenizer does not add its %s by itself: saved copies do", tokenizer.bos_token)
        if template:
            tokenizer.chat_template = named(template)

    @classmethod
    def from_pretrained(cls, path: str | os.PathLike[str], template: str = "") -> Text:
        """Load the tokenizer of a checkpoint: a local folder or a Hugging Face model name.

        template: writes conversations instead of the tokenizer's own (see templates.named); empty: as it is.
        Raises ValueError when there is no tokenizer, when it has no EOS token, or when there is no such template.
        """
        if template:
            named(template)  # refused before anything is loaded
        if str(path).startswith((".", "/")) and not os.path.isdir(path):
            raise ValueError(f"expected a checkpoint folder, got {str(path)!r}, which does not exist")
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except (OSError, ValueError) as error:
            reason = str(error).splitlines()[0].rstrip(" :")
            raise ValueError(f"expected a tokenizer in {str(path)!r}, found none that loads ({reason})") from error
        # A folder with nothing but config.json loads as a tokenizer that knows its special tokens and no word.
        if len(tokenizer) <= len(tokenizer.all_special_ids):
            raise ValueError(f"expected a tokenizer in {str(path)!r}, found no vocabulary there")
        try:
            return cls(tokenizer, template)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def save_pretrained(self, folder: str | os.PathLike[str]) -> None:
        """Write the tokenizer and its chat template to `folder`, for AutoTokenizer and from_pretrained."""
        try:
            self.tokenizer.save_pretrained(folder)
        except Exception as error:  # `tokenizers` raises no narrower one for a full disk
            raise OSError(f"the tokenizer cannot be written ({error})") from error

    @property
    def stop_ids(self) -> list[int]:
        """Ids that end a response: EOS, and the chat template's end of turn where that is another token."""
        if self.tokenizer.chat_template is None or self._end_of_turn in (None, self.tokenizer.eos_token):
            return [self.eos_id]
        return [self.eos_id, self.tokenizer.convert_tokens_to_ids(self._end_of_turn)]

    def prompt(self, prompt: Words) -> list[int]:
        """Ids that generation starts from: BOS + text, or a conversation up to where the assistant speaks next.

        A conversation gives the ids of `tokenizer.apply_chat_template(messages, add_generation_prompt=True)`.
        """
        if isinstance(prompt, str):
            return self._begin(self._encode(prompt))
        check_messages(prompt)
        if prompt[-1]["role"] == "assistant":
            raise ValueError("expected a prompt that ends before the assistant speaks, got one that ends with its turn")
        return self._encode(self._render(prompt, reply_next=True))

    def completion(self, text: str, append_eos: bool = True) -> list[int]:
        """Ids of a response. It ends in EOS exactly once, also where the text already spells it."""
        ids = self._encode(text)
        return self._end(ids) if append_eos else ids

    def document(self, text: str) -> list[int]:
        """Ids of a whole text for pre-training: BOS (if the tokenizer has one), the text, EOS."""
        return self._end(self._begin(self._encode(text)))

    def conversation(self, messages: Sequence[Message], first: int = 0) -> Example:
        """A conversation as one row, of which the assistant's turns from `messages[first]` on are learned.

        prompt    everything up to the first learned turn: prompt(messages[:that turn])
        response  that turn, what the others say, the next turn, ...
        learn     True on the assistant's words and the token that ends its turn, False on everything between

        An assistant message that opens the conversation answers nothing: it is context. Messages after the last
        learned turn are left out. A template that does not close the assistant's turn with a special token gets EOS
        there. Raises ValueError for malformed messages, for a conversation without a turn to learn, and for a template
        that rewrites earlier replies as the conversation goes on.
        """
        check_messages(messages)
        turns = [i for i, message in enumerate(messages) if i >= max(first, 1) and message["role"] == "assistant"]
        if not turns:
            raise ValueError("expected at least one assistant turn that answers something, got none")
        response: list[int] = []
        learn: list[bool] = []
        written = ""  # the conversation up to the end of the previous learned turn
        for i in turns:
            head = self._render(messages[:i], reply_next=True)
            if not head.startswith(written):
                raise ValueError(
                    "the chat template rewrites earlier replies as the conversation goes on, so one row cannot teach "
                    "several: give every assistant turn a row (prompt: the messages before it, completion: the reply)"
                )
            between = self._encode(head[len(written) :]) if written else []
            reply, written = self._reply(messages[: i + 1], head)
            response += between + reply
            learn += [False] * len(between) + [True] * len(reply)
        return Example(self.prompt(messages[: turns[0]]), response, learn)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of `ids`, without special tokens and exactly as spelled (no spaces tidied away)."""
        return self.tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)

    def _reply(self, messages: Sequence[Message], head: str) -> tuple[list[int], str]:
        """Ids of the last message, closed, and the conversation written up to there; `head`: up to its first word."""
        whole = self._render(messages, reply_next=False)
        if not whole.startswith(head):
            raise ValueError(
                "the chat template asks for a reply in other words than it stores one with, so the learned reply "
                "would not be what generation continues: use plain prompt and completion, or another template"
            )
        reply, mark, _ = whole[len(head) :].partition(self._end_of_turn or self.tokenizer.eos_token)
        if mark:
            return self._encode(reply + mark), head + reply + mark
        reply = reply.rstrip()  # what the template writes between turns is not the assistant's to learn
        return self._end(self._encode(reply)), head + reply

    @cached_property
    def _end_of_turn(self) -> str | None:
        """The special token that the chat template writes right after the assistant's words, None if it writes none."""
        probe = "zyxwv"
        messages = [{"role": "user", "content": "question"}, {"role": "assistant", "content": probe}]
        tail = self._render(messages, reply_next=False).rpartition(probe)[2]
        special = {i for i, token in self.tokenizer.added_tokens_decoder.items() if token.special}
        return next((self.tokenizer.convert_ids_to_tokens(i) for i in self._encode(tail) if i in special), None)

    def _render(self, messages: Sequence[Message], reply_next: bool) -> str:
        """The conversation as the chat template writes it; with `reply_next`, up to the assistant's first word."""
        if self.tokenizer.chat_template is None:
            self.tokenizer.chat_template = PLAIN_TEMPLATE
            log.info("the tokenizer has no chat template: conversations use a plain one, which saved copies keep")
        conversation = [dict(message) for message in messages]
        try:
            return self.tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=reply_next)
        except TemplateError as error:
            raise ValueError(f"the chat template refuses these messages ({error})") from error

    def _encode(self, text: str) -> list[int]:
        try:
            return self.tokenizer.encode(text, add_special_tokens=False, verbose=False)
        except Exception as error:  # `tokenizers` raises no narrower one for a word it does not know
            raise ValueError(f"the tokenizer cannot spell {text[:60]!r} ({error})") from error

    def _begin(self, ids: list[int]) -> list[int]:
        return ids if self.bos_id is None or ids[:1] == [self.bos_id] else [self.bos_id, *ids]

    def _end(self, ids: list[int]) -> list[int]:
        """`ids` with EOS exactly once at the end."""
        end = len(ids)
        while end and ids[end - 1] == self.eos_id:
            end -= 1
        return [*ids[:end], self.eos_id]


def check_messages(messages: Sequence[Message]) -> None:
    """Raise ValueError, with the number of the message, unless every one has a role and a content that are strings."""
    if not messages:
        raise ValueError("expected at least one message, got an empty list")
    for number, message in enumerate(messages, 1):
        if not isinstance(message, Mapping):
            raise ValueError(f"message {number}: expected an object with role and content, got {kind(message)}")
        for key in ("role", "content"):
            if key not in message:
                found = ", ".join(message) or "none"
                raise ValueError(f"message {number}: expected the keys role and content, got {found}")
            if not isinstance(message[key], str):
                raise ValueError(f"message {number}: expected {key} to be text, got {kind(message[key])}")


def spoken(asked: Words) -> str:
    """What was said, for people: plain text as it is, a conversation as lines of `role: content`."""
    if isinstance(asked, str):
        return asked
    return "\n".join(f"{message['role']}: {message['content']}" for message in asked)


def words(value: Any, column: str) -> Words:
    """A column's text as it is, or its list of messages, checked. Raises ValueError naming the column."""
    if isinstance(value, list):
        try:
            check_messages(value)
        except ValueError as error:
            raise ValueError(f"{column}: {error}") from error
    elif not isinstance(value, str):
        raise ValueError(f"expected {column} to be text or a list of messages, got {kind(value)}")
    return value
