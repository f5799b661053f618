# SPDX-License-Identifier: Apache-2.0
"""The forms in which texts and chats come, brought to one: ``{"text": str}`` or ``{"messages": [{role, content}]}``.

Read are ``messages`` (role, content), ShareGPT's ``conversations`` (from or role, value or content), Spec-Bench's
``turns`` (what the user says, one after the other) and plain ``text``; each row may use another one.
"""

from typing import Any

from datasets import Features, Value

FORMATS = ("messages", "conversations", "turns", "text")
FEATURES = Features(
    {
        "text": Value("string"),
        "messages": [{"role": Value("string"), "content": Value("string")}],
        "problem": Value("string"),
    }
)
ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


def normalize(row: dict[str, Any]) -> dict[str, Any]:
    """``text``, ``messages`` and ``problem`` of a row: one of the three is set, ``problem`` says why not the others."""
    found: dict[str, Any] = {"text": None, "messages": None, "problem": None}
    messages = row.get("messages") or row.get("conversations")
    try:
        if not messages and row.get("turns"):
            found["messages"] = _open_chat(row["turns"])
        elif messages:
            found["messages"] = [_message(message) for message in messages]
            if not turns(found["messages"]):
                raise ValueError("no user turn")
        elif (row.get("text") or "").strip():
            found["text"] = row["text"]
        else:
            raise ValueError("empty")
    except ValueError as error:
        return {"text": None, "messages": None, "problem": str(error)}
    return found


def _open_chat(said: list[str]) -> list[dict[str, str]]:
    """A chat whose answers are still to be written: empty ones stand between the turns."""
    return [
        message
        for turn in said
        for message in ({"role": "user", "content": turn}, {"role": "assistant", "content": ""})
    ]


def _message(message: dict[str, Any]) -> dict[str, str]:
    role = message.get("role") or message.get("from")
    if role not in ROLES:
        raise ValueError(f"role {role!r}")
    content = message.get("content") if message.get("content") is not None else message.get("value")
    if isinstance(content, list):
        # OpenAI's content parts; images and sounds have no "text".
        content = "".join(part["text"] for part in content) if all(part.get("text") for part in content) else None
    if not isinstance(content, str):
        raise ValueError("content that is not text")
    return {"role": ROLES[role], "content": content}


def turns(messages: list[dict[str, str]]) -> list[list[dict[str, str]]]:
    """What is said before each answer of the assistant, last turn included when it has no answer yet.

    Answers that answer nothing (at the start, or a second one in a row) belong to no turn.
    """
    found: list[list[dict[str, str]]] = []
    said: list[dict[str, str]] = []
    for message in [*messages, {"role": "assistant"}]:
        if message["role"] != "assistant":
            said.append(message)
        elif any(earlier["role"] == "user" for earlier in said):
            found.append(said)
            said = []
    return found
