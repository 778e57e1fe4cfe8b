"""A chat keeps what was said and nothing else, whoever answers, and whatever stops an answer."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from lorafit.chatting.commands import NAMES, Quit, is_command, run_command
from lorafit.chatting.session import SETTINGS, Chat
from lorafit.chatting.transcript import Transcript
from lorafit.contracts import Sample
from lorafit.errors import DataError, UsageError
from tests.unit.chatting.conftest import MakeChat


def told(chat: Chat, asked: str) -> str:
    return "".join(chat.answer(asked))


def does(chat: Chat, line: str, transcript: Transcript | None = None) -> str:
    said, asked = run_command(chat, transcript or Transcript(), line)
    assert asked is None
    return said


def asked_messages(chat: Chat, monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The chats that the speaker's template gets from now on."""
    seen: list[Any] = []
    voice, ask = type(chat.speaker.voice), type(chat.speaker.voice).ask

    def spy(self: Any, prompt: Sample) -> Any:
        seen.append(prompt.turns)
        return ask(self, prompt)

    monkeypatch.setattr(voice, "ask", spy)
    return seen


def test_each_answer_reads_all_that_was_said_and_switching_keeps_it(
    make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch
) -> None:
    chat = make_chat()
    seen = asked_messages(chat, monkeypatch)
    first = told(chat, "what opens?")
    assert does(chat, "/adapter code") == "code answers now"
    second = told(chat, "why?")
    assert does(chat, "/adapter base") == "base answers now"
    told(chat, "when?")
    roles = [(turn["role"], turn["content"]) for turn in seen[-1]]
    turns = [("user", "what opens?"), ("assistant", first), ("user", "why?"), ("assistant", second), ("user", "when?")]
    assert roles == turns
    assert [said.speaker for said in chat.said] == ["law", "code", "base"]


def test_each_adapter_answers_with_its_own_weights(make_chat: MakeChat) -> None:
    answers = {}
    for name in ("law", "code", "base"):
        chat = make_chat()
        chat.switch(name)
        answers[name] = told(chat, "what opens on monday?")
    assert len(set(answers.values())) == 3, answers
    assert does(make_chat(), "/adapter") == "law (answers now), code, base"


def test_the_system_message_is_the_user_s_or_the_run_s(make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = make_chat(system_prompt="Be kind.")
    seen = asked_messages(chat, monkeypatch)
    assert does(chat, "/system Be brief.") == "set for the whole conversation"
    told(chat, "why?")
    assert seen[-1][0] == {"role": "system", "content": "Be brief."}
    assert chat.rows()[0]["messages"][0]["content"] == "Be brief."
    assert does(chat, "/system") == "law's own: Be kind."
    told(chat, "when?")
    assert seen[-1][0]["role"] == "user"  # the renderer puts the run's own in front
    assert chat.rows()[0]["messages"][0]["content"] == "Be kind."


def test_what_was_stopped_stays_and_carries_no_loss(make_chat: MakeChat) -> None:
    chat = make_chat(max_new_tokens=40, min_new_tokens=20)
    pieces = chat.answer("what?")
    begun = next(pieces) + next(pieces)
    pieces.close()
    assert [(said.answer, said.ended) for said in chat.said] == [(begun, "stopped")]
    assert chat.rows() == [], "a file of one stopped answer is nothing to train on"
    with pytest.raises(UsageError, match="the only answer was stopped or cut, and is none to train on; /retry, or"):
        does(chat, "/save talk.jsonl")
    does(chat, "/min_new_tokens 3")
    whole = told(chat, "and?")
    assert chat.said[-1].ended == "stop"
    turns = chat.rows()[0]["messages"]
    assert turns[1] == {"role": "assistant", "content": begun, "weight": 0}
    assert turns[3] == {"role": "assistant", "content": whole}


def test_undo_retry_and_new(make_chat: MakeChat) -> None:
    chat = make_chat()
    first = told(chat, "what?")
    told(chat, "why?")
    assert does(chat, "/undo") == "taken back: why?"
    assert [exchange.answer for exchange in chat.conversation.exchanges] == [first]
    assert "chosen greedily" in does(chat, "/retry")
    assert [exchange.answer for exchange in chat.conversation.exchanges] == [first]
    does(chat, "/temperature 1.5")
    assert run_command(chat, Transcript(), "/retry") == ("", "what?")
    drawn = told(chat, "what?")
    assert run_command(chat, Transcript(), "/retry") == ("", "what?")
    assert told(chat, "what?") not in (drawn, first)
    assert "a new conversation" in does(chat, "/new")
    for line in ("/undo", "/retry"):
        with pytest.raises(UsageError, match="nothing was said yet"):
            run_command(chat, Transcript(), line)


def test_another_adapter_may_retry_greedily(make_chat: MakeChat) -> None:
    chat = make_chat()
    told(chat, "what?")
    chat.switch("code")
    assert run_command(chat, Transcript(), "/retry") == ("", "what?")


def test_the_same_draws_give_the_same_chat(make_chat: MakeChat) -> None:
    one, other = make_chat(temperature=1.0, seed=3), make_chat(temperature=1.0, seed=3)
    assert [told(one, text) for text in ("what?", "what?")] == [told(other, text) for text in ("what?", "what?")]
    assert told(one, "why?") != told(make_chat(temperature=1.0, seed=4), "why?")


def test_settings_are_read_and_refused_as_flags_are(make_chat: MakeChat) -> None:
    chat = make_chat()
    assert does(chat, "/temperature 0.5") == "temperature 0.5" == does(chat, "/temperature")
    assert does(chat, "/top-p .9") == "top_p 0.9"
    assert does(chat, "/max_new_tokens 7") == "max_new_tokens 7" and chat.sampling.max_new_tokens == 7
    for line, says in (
        ("/temperature hot", "/temperature: found 'hot'; give a number from 0 to 10"),
        ("/max_new_tokens 1.5", "/max_new_tokens: found '1.5'; give a whole number, 1 or more"),
        ("/temperature 0", "/top_p: only sampled tokens read it; add /temperature 0.7, or leave it out"),
        ("/min_new_tokens 9", "/min_new_tokens: 9 is more than the longest answer, 7"),
    ):
        with pytest.raises(UsageError) as error:
            run_command(chat, Transcript(), line)
        assert error.value.one_line.startswith(says), error.value.one_line
    assert (chat.sampling.temperature, chat.sampling.min_new_tokens) == (0.5, 3)
    assert {name for name in SETTINGS if does(chat, f"/{name}").startswith(f"{name} ")} == set(SETTINGS)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ("/adaptor code", "no command is called /adaptor; did you mean /adapter? /help lists all"),
        ("/xyzzy", "no command is called /xyzzy; /help lists all"),
        ("/adapter cod", "/adapter: no adapter is called 'cod'; did you mean code? here: law, code, base"),
        ("/save", "/save: needs the name of a file"),
        ("/save talk.txt", "talk.txt: is no file of JSON lines"),
    ],
)
def test_a_slip_is_told_with_what_was_meant(make_chat: MakeChat, line: str, says: str) -> None:
    with pytest.raises(UsageError) as error:
        run_command(make_chat(), Transcript(), line)
    assert error.value.one_line.startswith(says), error.value.one_line


def test_help_names_every_command_and_quit_leaves(make_chat: MakeChat) -> None:
    said = does(make_chat(), "/help")
    assert [name for name in NAMES if f"/{name}" not in said] == []
    with pytest.raises(Quit):
        run_command(make_chat(), Transcript(), "/quit")
    assert is_command("/quit") and not is_command("//etc") and not is_command("why?")


def test_a_full_conversation_says_so_and_takes_the_message_back(make_chat: MakeChat) -> None:
    chat = make_chat()
    told(chat, "what?")
    before = list(chat.conversation.exchanges)
    with pytest.raises(DataError, match=r"has [\d,]+ tokens, which fill the model's positions; .*/undo.*/new"):
        told(chat, "why " * 200)
    assert chat.conversation.exchanges == before
    told(chat, "why?")


def test_an_answer_is_cut_at_the_last_position(make_chat: MakeChat) -> None:
    chat = make_chat(max_new_tokens=159, min_new_tokens=159)
    told(chat, "what? " * 20)
    assert chat.said[-1].tokens < 100
    assert chat.said[-1].ended == "length"
    assert chat.rows() == [], "what was cut has no end to learn"


def test_verbatim_speakers_know_nothing_of_earlier_messages(
    make_chat: MakeChat, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chat = make_chat(verbatim=True)
    seen = asked_messages(chat, monkeypatch)
    assert "forgets earlier ones" in chat.speaker.habits
    answers = [told(chat, "what?"), told(chat, "why?")]
    assert [turn["content"] for turn in seen[-1]] == ["why?"]
    with pytest.raises(UsageError, match="law knows no chat, so it reads no system message"):
        chat.set_system("Be kind.")
    assert chat.conversation.system is None
    rows = [{"prompt": asked, "completion": text} for asked, text in zip(("what?", "why?"), answers, strict=True)]
    assert chat.rows() == rows
    assert does(chat, f"/save {tmp_path}/talk.jsonl") == f"2 rows in {tmp_path}/talk.jsonl"


def test_a_conversation_replaces_its_own_lines_and_no_others(make_chat: MakeChat, tmp_path: Path) -> None:
    chat, transcript, file = make_chat(), Transcript(), tmp_path / "talk.jsonl"
    file.write_text('{"question": "q", "answer": "a"}')
    file.chmod(0o600)
    told(chat, "what?")
    assert "behind 1 line that stood there" in does(chat, f"/save {file}", transcript)
    told(chat, "☃?")
    does(chat, f"/save {file}", transcript)
    first, own = file.read_text(encoding="utf-8").splitlines()
    assert json.loads(first) == {"question": "q", "answer": "a"}
    assert json.loads(own) == chat.rows()[0] and len(json.loads(own)["messages"]) == 4 and "☃" in own
    assert file.stat().st_mode & 0o777 == 0o600
    does(chat, "/new", transcript)
    told(chat, "when?")
    does(chat, f"/save {file}", transcript)
    assert len(file.read_text(encoding="utf-8").splitlines()) == 3
    file.write_text('{"question": "q"}\nnotes of mine\n')
    with pytest.raises(DataError, match="line 2 is no JSON object; name another file"):
        does(chat, f"/save {file}", transcript)
    assert file.read_text() == '{"question": "q"}\nnotes of mine\n'
    with pytest.raises(UsageError, match=f"no such folder; {tmp_path} is the nearest"):
        does(chat, f"/save {tmp_path}/a/b/talk.jsonl", transcript)
    assert not (tmp_path / "a").exists()
    file.write_bytes(b"\xff\xfe")
    with pytest.raises(DataError, match="no text in UTF-8"):
        does(chat, f"/save {file}", transcript)
