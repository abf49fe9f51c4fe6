"""Text to train the example model on: short stories and chats, made by a grammar of our own.

Every text here was written for llamac, so the model can be given away with it. The same seed
gives the same documents. A document is a list of turns; a plain story has one turn without role.

The plots stand in `tiny_plots.py`, the words in `tiny_cast.py`; this file tells stories and wraps
them into chats.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import NamedTuple

from llamac.tools import tiny_plots
from llamac.tools.tiny_cast import Scene, deal_scene


class Turn(NamedTuple):
    """One turn of a chat; the role is empty for a plain text."""

    role: str
    text: str


Document = list[Turn]


class Line(NamedTuple):
    """One line of a plot: its mark, and the ways to say it."""

    mark: str
    ways: list[str]


class Plot(NamedTuple):
    """A parsed plot."""

    topic: str
    lines: list[Line]


def parse_lines(text: str) -> list[Line]:
    """Read the notation of `tiny_plots.py`."""
    lines: list[Line] = []
    for row in filter(None, text.splitlines()):
        mark, sentence = row.split(" ", 1)
        if mark == "|":
            lines[-1].ways.append(sentence)
        else:
            lines.append(Line(mark, [sentence]))
    return lines


def parse_plots(text: str) -> list[Plot]:
    """Read all plots; each begins with its topic."""
    plots: list[Plot] = []
    for line in parse_lines(text):
        if line.mark == "#":
            plots.append(Plot(line.ways[0], []))
        else:
            plots[-1].lines.append(line)
    return plots


OPENING, ENDING = parse_lines(tiny_plots.OPENING)[0], parse_lines(tiny_plots.ENDING)[0]
PLOTS = parse_plots(tiny_plots.PLOTS)

# Parts of the corpus, by how often they are dealt.
PLAIN_STORY, STORY_CHAT, LONG_CHAT, SMALL_TALK, COMPREHENSION, OFF_TOPIC = 36, 34, 6, 6, 14, 4

SYSTEM = (
    "You are a kind storyteller.",
    "You tell short stories for children.",
    "You are a helpful assistant.",
)

_ASK = (
    "Tell me a story about {}.",
    "Please tell me a story about {}.",
    "Can you tell me a story about {}?",
    "Write a short story about {}.",
    "I would like a story about {}.",
    "Tell me about {}.",
)
_ASK_ANY = (
    "Tell me a story.",
    "Please tell me a story.",
    "Can you tell me a short story?",
    "I want to hear a story.",
    "Do you know a good story?",
)
_MORE = ("Another one, please.", "Tell me another story.", "One more, please!", "More!")
_MORE_ABOUT = ("Now tell me a story about {}.", "And a story about {}, please.")
_THANKS = ("Thank you!", "Thank you, that was nice.", "I liked that story.", "That was lovely.")
_WELCOME = (
    "You are welcome! I am glad you liked it.",
    "You are welcome! Ask me when you want another one.",
    "I am happy that you liked it. Sleep well!",
)

_TALK = (
    (("Hello!", "Hi!", "Good morning!", "Hello there."),
     ("Hello! Would you like to hear a story?", "Hello! What should my story be about?")),
    (("Who are you?", "What are you?", "What is your name?"),
     ("I am a very small language model. I tell short stories.",)),
    (("What can you do?", "Can you help me?", "What do you know?"),
     ("I can tell short stories. Tell me what the story should be about.",)),
    (("How are you?", "How are you today?"),
     ("I am fine, thank you. Would you like to hear a story?",)),
    (("Good night!", "Good night.", "Bye!", "Goodbye."),
     ("Good night! Sleep well and dream of nice things.", "Goodbye! Come back soon.")),
    (("Are you a person?", "Are you real?", "Are you a robot?"),
     ("No, I am a very small program that makes up stories.",)),
    (_THANKS, _WELCOME),
)  # fmt: skip

_OFF_TOPIC = (
    "Why is {} {}?",
    "How does {} work?",
    "What is {}?",
    "Explain {} to me.",
    "Write a poem about {}.",
    "Where does {} come from?",
    "How do I build {}?",
)
_OFF_TOPIC_THINGS = (
    "the sky|the sea|a computer|a phone|the internet|gravity|light|a compiler|money|music|time"
    "|a car|an engine|the weather|history|a number|electricity|a plane|the world|science|math"
).split("|")
_OFF_TOPIC_KINDS = "blue|big|hot|cold|round|green|dark|fast|slow|important".split("|")
_SORRY = (
    "I do not know that. I only know short stories. Would you like one?",
    "That is too hard for me. I am very small and only tell stories.",
)


def documents(count: int, seed: int) -> Iterator[Document]:
    """Deal `count` documents; equal arguments give equal documents."""
    rng = random.Random(seed)
    makers: tuple[tuple[Callable[[random.Random], Document], int], ...] = (
        (plain_story, PLAIN_STORY),
        (story_chat, STORY_CHAT),
        (long_chat, LONG_CHAT),
        (small_talk, SMALL_TALK),
        (comprehension, COMPREHENSION),
        (off_topic, OFF_TOPIC),
    )
    kinds, shares = zip(*makers, strict=True)
    for maker in rng.choices(kinds, shares, k=count):
        yield maker(rng)


def tell(rng: random.Random, scene: Scene, plot: Plot) -> str:
    """The text of one story."""
    sentences = []
    for line in (OPENING, *plot.lines):
        if line.mark == "?" and rng.random() < 0.5:
            continue
        use_own = line.mark != ">" or rng.random() < 0.7
        sentences.append(rng.choice(line.ways if use_own else ENDING.ways))
    return scene.fill(" ".join(sentences))


def plain_story(rng: random.Random) -> Document:
    """A story without a chat around it."""
    return [Turn("", tell(rng, deal_scene(rng), rng.choice(PLOTS)))]


def story_chat(rng: random.Random) -> Document:
    """A user asks for a story about something, and gets it."""
    return [*_system(rng), *_story_turns(rng, _ASK, _ASK_ANY)]


def long_chat(rng: random.Random) -> Document:
    """A story, then thanks or a second story."""
    first = [*_system(rng), *_story_turns(rng, _ASK, _ASK_ANY)]
    if rng.random() < 0.4:
        thanks, welcome = rng.choice(_THANKS), rng.choice(_WELCOME)
        return [*first, Turn("user", thanks), Turn("assistant", welcome)]
    return [*first, *_story_turns(rng, _MORE_ABOUT, _MORE)]


def small_talk(rng: random.Random) -> Document:
    """A greeting or a question about the model, sometimes followed by a story."""
    asked, answers = rng.choice(_TALK)
    turns = [*_system(rng), Turn("user", rng.choice(asked)), Turn("assistant", rng.choice(answers))]
    if rng.random() < 0.4:
        turns += _story_turns(rng, _ASK, _ASK_ANY)
    return turns


def comprehension(rng: random.Random) -> Document:
    """One or two facts and a question about one of them."""
    scene = deal_scene(rng)
    first, second = scene.hero, scene.friend
    facts = [
        (first.name, f"{first.name} has {scene.thing.a_full}.", scene.thing.full),
        (second.name, f"{second.name} has {scene.other_thing.a_full}.", scene.other_thing.full),
    ]
    owner, fact, thing = rng.choice(facts)
    text = " ".join(fact for _, fact, _ in rng.sample(facts, 2))
    if rng.random() < 0.5:
        question, answer = f"What does {owner} have?", fact
    else:
        question, answer = f"Who has the {thing}?", f"{owner} has the {thing}."
    return [*_system(rng), Turn("user", f"{text} {question}"), Turn("assistant", answer)]


def off_topic(rng: random.Random) -> Document:
    """A question that the model says it cannot answer."""
    asked = rng.choice(_OFF_TOPIC).format(
        rng.choice(_OFF_TOPIC_THINGS), rng.choice(_OFF_TOPIC_KINDS)
    )
    return [*_system(rng), Turn("user", asked), Turn("assistant", rng.choice(_SORRY))]


def _system(rng: random.Random) -> Document:
    return [Turn("system", rng.choice(SYSTEM))] if rng.random() < 0.2 else []


def _story_turns(rng: random.Random, about: tuple[str, ...], anything: tuple[str, ...]) -> Document:
    """A request and the story that answers it; the request names what the story is about."""
    scene, plot = deal_scene(rng), rng.choice(PLOTS)
    if rng.random() < 0.15:
        asked = rng.choice(anything)
    else:
        hero, plot_topic = scene.hero, scene.fill(plot.topic)
        topic = rng.choice(
            (
                plot_topic,
                hero.a_kind,
                hero.a_kind,
                f"{hero.a_kind} named {hero.name}",
                f"{hero.a_kind} and {plot_topic}",
                f"{hero.name} and {scene.friend.name}",
            )
        )
        asked = rng.choice(about).format(topic)
    return [Turn("user", asked), Turn("assistant", tell(rng, scene, plot))]
