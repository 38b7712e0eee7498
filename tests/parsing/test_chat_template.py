import pytest
from chimera.errors import ConfigError, RequestError
from chimera.parsing.chat_template import ChatTemplate

HI = [{"role": "user", "content": "hi <you> 'n me"}]


def template(source: str) -> ChatTemplate:
    return ChatTemplate(source, {"bos_token": "<s>", "eos_token": "</s>"}, path="model")


def test_a_template_sees_messages_special_tokens_and_its_own_switches() -> None:
    source = "{{ bos_token }}{% for m in messages %}[{{ m.role }}]{{ m['content'] | trim }}{% endfor %}{{ 'think' if deep }}"
    assert template(source).render(HI, {"deep": True}) == "<s>[user]hi <you> 'n methink"


def test_tojson_writes_what_models_were_trained_on() -> None:
    assert template("{{ messages[0].content | tojson }}").render(HI) == '"hi <you> \'n me"'
    assert template("{{ {'b': 'é', 'a': 1} | tojson(indent=2) }}").render(HI) == '{\n  "b": "é",\n  "a": 1\n}'


def test_blocks_leave_no_white_space_and_loops_may_break() -> None:
    source = "{% for m in messages %}\n  {% if loop.index > 1 %}\n  {% break %}\n  {% endif %}\n{{ m.role }}\n{% endfor %}\n"
    assert template(source).render(HI * 3) == "user\n"


def test_training_marks_and_the_date_are_known() -> None:
    source = "{% generation %}{{ messages[0].role }}{% endgeneration %} {{ strftime_now('%Y')[:2] }}"
    assert template(source).render(HI) == "user 20"


def test_switches_cannot_replace_the_messages() -> None:
    assert template("{{ messages[0].role }}").render(HI, {"messages": [{"role": "forged"}]}) == "user"


@pytest.mark.parametrize(
    "source",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content.x }}",
        "{{ 'a' + 1 }}",
        "{{ messages[0].content.__class__.__mro__ }}",
    ],
)
def test_a_template_that_refuses_or_breaks_is_the_requests_error(source: str) -> None:
    with pytest.raises(RequestError, match="chat template refuses"):
        template(source).render(HI)


def test_a_template_that_does_not_compile_names_its_line() -> None:
    with pytest.raises(ConfigError, match="line 2"):
        template("{% if x %}\n{% endfor %}")
