"""Tells stories of six sentences about the animal that was asked for, in one of three plots.

The grammar is a list of steps; each step is one of a few sentences with gaps. A gap keeps its filling for the whole story
(who the hero is, what was lost), so a story that changes its hero's name half-way is not in the language, as `is_story` says.
"""

from __future__ import annotations

import random
import re
import zlib
from collections.abc import Iterator, Mapping, Sequence

from .lesson import Example, Lesson

Words = dict[str, str]

_KINDS = (
    "fox owl bear rabbit mouse duck frog cat dog pony lamb goat hedgehog otter squirrel turtle sparrow beaver penguin elephant"
    " lion monkey snail dragon"
)
_ANIMALS = {kind: f"{'an' if kind[0] in 'aeiou' else 'a'} {kind}" for kind in _KINDS.split()}
"""With its article, for requests; in stories an adjective stands between, and brings its own."""
_WITHOUT_ARTICLE = {animal: name for name, animal in _ANIMALS.items()}
_HE = ["Max", "Tom", "Ben", "Leo", "Sam", "Finn", "Oscar", "Hugo"]
_SHE = ["Lily", "Mia", "Anna", "Ruby", "Nora", "Ella", "Rosa", "Ida"]
_GAPS = {
    "hero": tuple(_ANIMALS),
    "friend": tuple(_ANIMALS),
    "name": (*_HE, *_SHE),
    "friend_name": ("Pip", "Hazel", "Bruno", "Willow", "Otto", "Greta", "Basil", "Clover", "Felix", "Ivy", "Jasper", "Olive"),
    "adjective": ("a small", "a brave", "a clever", "an old", "a happy", "a young", "a shy", "a kind", "a curious", "a hungry"),
    "friend_adjective": ("a wise", "a friendly", "a tall", "a funny", "an honest", "a gentle", "a quiet", "a busy"),
    "place": ("the forest", "the mountains", "the garden", "the village", "the meadow", "the big city", "the valley"),
    "thing": ("ball", "drum", "key", "hat", "kite", "lantern", "bell", "boat", "telescope", "book"),
    "skill": ("swim", "sing", "dance", "climb trees", "whistle", "bake bread", "paint", "tell jokes"),
    "weather": ("sunny", "rainy", "windy", "cold", "warm", "foggy"),
    "spot": ("under a tree", "behind the barn", "near the river", "in the tall grass", "on the hill", "by the old well"),
    "other_spot": ("in a hollow log", "under the bridge", "beside the pond", "in the attic", "behind a rock", "in the hay"),
    "end": ("the sun went down", "the stars came out", "it was time for supper", "the moon rose", "they fell asleep"),
}
_OPENING = (
    "Once upon a time there was {adjective} {hero} named {name}.",
    "Once there was {adjective} {hero} called {name}.",
    "In {place} lived {adjective} {hero} named {name}.",
    "There once was {adjective} {hero} named {name}, who lived in {place}.",
)
_MEETING = (
    "Then {he} met {friend_adjective} {friend} named {friend_name}.",
    "Just then {friend_adjective} {friend} named {friend_name} came along.",
    "After a while {he} saw {friend_adjective} {friend}, whose name was {friend_name}.",
)
_ENDING = (
    "{name} thanked {friend_name}, and they played together until {end}.",
    '"Thank you, {friend_name}," said {name}, and they laughed until {end}.',
    "From that day on {name} and {friend_name} were the best of friends.",
    "{name} and {friend_name} danced for joy until {end}.",
)
_PLOTS = {
    "lost": (
        _OPENING,
        (
            "One {weather} day {he} lost {his} {thing}.",
            "One {weather} morning {his} {thing} was gone.",
            "{He} loved {his} {thing}, but one {weather} day it was gone.",
        ),
        (
            "{He} looked {spot}, but it was not there.",
            "{name} searched {spot} and found nothing.",
            "{He} sat down {spot} and cried.",
        ),
        _MEETING,
        (
            '"I will help you look," said {friend_name}, and they found it {other_spot}.',
            '"Let us look together," said {friend_name}, and there it lay, {other_spot}.',
            '"I saw it {other_spot}," said {friend_name}.',
        ),
        _ENDING,
    ),
    "learn": (
        _OPENING,
        (
            "{name} wanted to learn how to {skill}.",
            "More than anything, {he} wished to {skill}.",
            "All {his} friends could {skill}, but {name} could not.",
        ),
        (
            "One {weather} day {he} tried it {spot}, but it was too hard.",
            "{He} tried and tried {spot}, and it went wrong every time.",
        ),
        _MEETING,
        (
            '"I can show you," said {friend_name}, and soon {name} could {skill}.',
            '"It only takes patience," said {friend_name}, and before long {he} could {skill}.',
            '"Watch me first," said {friend_name}, and at last {name} could {skill}, too.',
        ),
        _ENDING,
    ),
    "storm": (
        _OPENING,
        (
            "One {weather} night {he} was alone {spot}.",
            "{name} liked to sit {spot} and watch the clouds.",
            "One {weather} evening {he} walked home late.",
        ),
        (
            "Suddenly a great storm began, and {he} hid {other_spot}.",
            "All at once the sky turned black, and {name} hid {other_spot}.",
            "Then thunder rolled, and {name} was afraid.",
        ),
        _MEETING,
        (
            '"Come with me," said {friend_name}. "It is dry in my house."',
            '"The storm will pass," said {friend_name}, and held {his} paw.',
            '"You are safe with me," said {friend_name}, and the storm went away.',
        ),
        _ENDING,
    ),
}
_REQUESTS = (
    "Tell me a story about {a_hero}.",
    "tell me a story about {a_hero}",
    "A story about {a_hero}, please.",
    "Tell me a story about {a_hero} named {name}.",
    "Tell me a story about {a_hero} who lives in {place}.",
    "Tell me a story about {a_hero} who lost a {thing}.",
    "Tell me about {a_hero} and a {thing}.",
    "Write a story about {a_hero} who wants to {skill}.",
    "Tell me a story.",
    "Please tell me a story.",
)
_OTHER = (
    "Hello",
    "Hi",
    "Good morning",
    "Who are you?",
    "What can you do?",
    "Help",
    "Thank you",
    "What is 17 + 25?",
    "List the files in /tmp",
)
_ABOUT = "I tell stories. Try: Tell me a story about a fox."


def example(dice: random.Random) -> Example:
    kind = dice.random()
    if kind < 0.03:
        return Example(dice.choice(_OTHER), _ABOUT)
    return _repetition(dice) if kind < 0.15 else _one(dice, held_out=False)


def held_out(count: int) -> Iterator[Example]:
    """Requests that training never saw: what they bring together was only ever asked for apart."""
    dice = random.Random("stories, held out")
    for _ in range(count):
        yield _one(dice, held_out=True)


def is_held_out(form: str, request: str) -> bool:
    """One request in eight of those that name two things."""
    return form.count("{") == 2 and zlib.crc32(request.encode()) % 8 == 0


def right(request: str, _wanted: str, given: str) -> bool:
    return any(is_story(given, words) for form in _REQUESTS if (words := _asked(form, request)) is not None)


def is_story(text: str, words: Mapping[str, str]) -> bool:
    """Whether `text` is of the language, with what is already known of it."""
    return any(_follows(text, plot, dict(words)) for plot in _PLOTS.values())


def _repetition(dice: random.Random) -> Example:
    """Words said back: whoever tells a story has to keep some in mind, and learns it sooner where nothing else is asked."""
    words = ", ".join(dice.choice(_GAPS[gap]) for gap in dice.choices(list(_GAPS), k=8))
    return Example(f"Say: {words}", words)


def _one(dice: random.Random, *, held_out: bool) -> Example:
    while True:
        words = {gap: dice.choice(fillings) for gap, fillings in _GAPS.items()}
        form = dice.choice(_REQUESTS)
        request = form.format_map(words | {"a_hero": _ANIMALS[words["hero"]]})
        if is_held_out(form, request) == held_out:
            plot = "lost" if "{thing}" in form else "learn" if "{skill}" in form else dice.choice(list(_PLOTS))
            opening = dice.choice([one for one in _OPENING if "{place}" in one or "{place}" not in form])
            story = " ".join([opening, *(dice.choice(step) for step in _PLOTS[plot][1:])])
            return Example(request, story.format_map(words | _pronouns(words["name"])))


def _pronouns(name: str) -> Words:
    he, his = ("he", "his") if name in _HE else ("she", "her")
    return {"he": he, "his": his, "He": he.capitalize(), "His": his.capitalize()}


def _follows(text: str, steps: Sequence[Sequence[str]], words: Words) -> bool:
    if not steps:
        return not text
    for sentence in steps[0]:
        found = re.match(_pattern(sentence, words) + r"(?: |$)", text)
        if found is not None:
            known = words | found.groupdict()
            known |= _pronouns(known["name"])
            if _follows(text[found.end() :], steps[1:], known):
                return True
    return False


def _asked(form: str, request: str) -> Words | None:
    """What is known of the story from a request of this form; `None` if it is none."""
    found = re.fullmatch(_pattern(form, {}), request)
    if found is None:
        return None
    words = found.groupdict()
    return {gap.removeprefix("a_"): _WITHOUT_ARTICLE.get(filling, filling) for gap, filling in words.items()}


def _pattern(form: str, words: Mapping[str, str]) -> str:
    """What is known must be there word for word; each other gap takes any of its fillings."""
    pattern = ""
    for part in re.split(r"(\{\w+\})", form):
        gap = part[1:-1]
        if not part.startswith("{"):
            pattern += re.escape(part)
        elif gap in words:
            pattern += re.escape(words[gap])
        else:
            fillings = _WITHOUT_ARTICLE if gap.startswith("a_") else _GAPS[gap]
            pattern += f"(?P<{gap}>" + "|".join(map(re.escape, fillings)) + ")"
    return pattern


STORIES = Lesson(
    name="stories",
    purpose="Llama that tells stories",
    config={
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "mlp_bias": False,
    },
    special=("<s>", "</s>", "<pad>", "[INST]", "[/INST]"),
    chat_template=(
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ bos_token + '[INST]' + asked[-1]['content'] + '[/INST]' }}"
    ),
    split=r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s+",
    vocabulary=1024,
    example=example,
    held_out=held_out,
    right=right,
    goal=0.95,
    steps=2_400,
    batch=12,
    temperature=0.3,
)
