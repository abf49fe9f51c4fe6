"""Who and what can appear in the example model's stories."""

from __future__ import annotations

import random
from dataclasses import dataclass

GIRLS = (
    "Mia Lily Anna Emma Zoe Nora Ella Ruby Lucy Sara Ivy Rosa Maya Tess Lena Kate Amy Clara Hanna"
    " Nina Julia Molly"
).split()
BOYS = (
    "Tom Ben Max Leo Sam Tim Finn Noah Jack Oscar Hugo Eli Luke Adam Owen Theo Nico Paul Milo Ian"
    " Felix Otto"
).split()
PETS = "Pip Dot Momo Fuzz Bobo Nibble Pepper Button Coco Tilly Biscuit Rusty Hazel Sunny".split()
ANIMALS = (
    "fox rabbit bear mouse cat dog owl frog duck hedgehog squirrel turtle pony goat lamb pig otter"
    " badger deer kitten puppy penguin"
).split()
LOOKS = "red blue green yellow little shiny old new soft wooden golden white striped round".split()
TOYS = "ball kite hat boat drum book bell box scarf lamp cup basket button ring doll flute".split()
FOODS = "apple cake cookie pie bun pear plum carrot sandwich berry muffin pancake".split()
MOODS = "little small young little small young happy cheerful kind curious brave clever".split()
PLACES = (
    "in the forest|in the garden|by the river|on the hill|at the beach|in the park|by the lake"
    "|in the village|on the farm|near the old mill|in the meadow|under the big tree"
).split("|")
HIDING_PLACES = (
    "under a bush|behind a rock|under the bed|in a tree|behind the door|in the tall grass"
    "|under a pile of leaves|beside the well|inside an old boot|on the roof"
).split("|")
SKILLS = "swim|dance|sing|climb|skate|paint|whistle|ride a bike|jump rope|read".split("|")
TROUBLES = "could not find its mother|was stuck in a hole|had hurt its foot|was lost".split("|")
SMALL_ANIMALS = "bird kitten bee lamb duckling snail butterfly beetle chick".split()
PLANTS = "flower tree pumpkin sunflower rose".split()
SOUNDS = "Knock, knock|Tap, tap|Scratch, scratch|Bump, bump".split("|")
PARENTS = "mother father grandma grandpa".split()
TIMES = "day morning afternoon".split()
INGREDIENTS = (
    ("eggs", "hen"),
    ("milk", "cow"),
    ("honey", "bee"),
    ("apples", "horse"),
    ("nuts", "squirrel"),
)
BUILDS = (
    ("boat", "wood and an old sheet", "sailed it on the lake"),
    ("kite", "paper and string", "let it fly in the wind"),
    ("house", "branches and leaves", "sat in it all day"),
    ("sled", "two boards and a rope", "rode it down the hill"),
)


def a_or_an(words: str) -> str:
    """The words with their article."""
    return f"{'an' if words[0] in 'aeiou' else 'a'} {words}"


# Properties begin with a capital letter where they begin a sentence.


@dataclass(frozen=True)
class Being:
    """Somebody in a story."""

    name: str
    kind: str
    is_she: bool

    @property
    def who(self) -> str:
        """The name, and the kind of an animal: "Pip the fox"."""
        return self.name if self.kind in ("girl", "boy") else f"{self.name} the {self.kind}"

    @property
    def a_kind(self) -> str:
        """The kind with its article."""
        return a_or_an(self.kind)

    @property
    def he(self) -> str:
        """The pronoun as a subject."""
        return "she" if self.is_she else "he"

    @property
    def him(self) -> str:
        """The pronoun as an object."""
        return "her" if self.is_she else "him"

    @property
    def his(self) -> str:
        """The possessive."""
        return "her" if self.is_she else "his"

    @property
    def He(self) -> str:
        """The subject at the beginning of a sentence."""
        return self.he.capitalize()

    @property
    def His(self) -> str:
        """The possessive at the beginning of a sentence."""
        return self.his.capitalize()


@dataclass(frozen=True)
class Thing:
    """Something that can be lost, found and given."""

    look: str
    name: str

    @property
    def full(self) -> str:
        """Look and name: "red kite"."""
        return f"{self.look} {self.name}"

    @property
    def a_full(self) -> str:
        """Look and name with an article."""
        return a_or_an(self.full)


@dataclass(frozen=True)
class Scene:
    """All that the plots may name, dealt once per story."""

    hero: Being
    friend: Being
    thing: Thing
    other_thing: Thing
    words: dict[str, str]

    def fill(self, sentence: str) -> str:
        """Put the cast into a sentence of a plot."""
        return sentence.format(h=self.hero, f=self.friend, t=self.thing, u=self.other_thing, s=self)

    def __getattr__(self, name: str) -> str:
        try:
            return self.words[name]
        except KeyError:
            raise AttributeError(name) from None


def deal_being(rng: random.Random) -> Being:
    """A child, or an animal with a name."""
    is_she = rng.random() < 0.5
    if rng.random() < 0.4:
        return Being(rng.choice(GIRLS if is_she else BOYS), "girl" if is_she else "boy", is_she)
    return Being(rng.choice(PETS), rng.choice(ANIMALS), is_she)


def deal_scene(rng: random.Random) -> Scene:
    """A hero, a friend of another name, things of two kinds, and the other words."""
    hero = friend = deal_being(rng)
    while friend.name == hero.name:
        friend = deal_being(rng)
    things = [*map(Thing, rng.sample(LOOKS, 2), rng.sample(TOYS, 2))]
    hiding = rng.sample(HIDING_PLACES, 2)
    missing, giver = rng.choice(INGREDIENTS)
    made, parts, trial = rng.choice(BUILDS)
    food = rng.choice(FOODS)
    words = {
        "hero_with_mood": a_or_an(f"{rng.choice(MOODS)} {hero.kind}"),
        "home": rng.choice(PLACES),
        "place": rng.choice(PLACES),
        "time": rng.choice(TIMES),
        "first_hiding": hiding[0],
        "second_hiding": hiding[1],
        "skill": rng.choice(SKILLS),
        "trouble": rng.choice(TROUBLES),
        "small_animal": rng.choice(SMALL_ANIMALS),
        "plant": rng.choice(PLANTS),
        "sound": rng.choice(SOUNDS),
        "parent": rng.choice(PARENTS),
        "food": food,
        "a_food": a_or_an(food),
        "missing": missing,
        "giver": giver,
        "made": made,
        "parts": parts,
        "trial": trial,
    }
    return Scene(hero, friend, things[0], things[1], words)
