"""The world of the embedded models: the names that they can draw.

The names are few enough for models of this size to master in hours on two CPU cores.  They are distinct, by shape and
by colour, at 64x64 pixels in all three emoji sets.
"""

from __future__ import annotations

_FOOD = """
avocado; banana; beer mug; birthday cake; broccoli; carrot; cheese wedge; cherries; cookie; croissant; cupcake;
doughnut; eggplant; french fries; grapes; hamburger; hot beverage; hot pepper; lemon; lollipop; mushroom; peach; pear;
pineapple; pizza; popcorn; pretzel; red apple; soft ice cream; strawberry; teapot; watermelon; wine glass
"""
_ANIMALS = """
bear; butterfly; cat face; cow face; crab; dog face; elephant; fox; frog; hatching chick; honeybee; koala; lady beetle;
lion; monkey face; octopus; owl; panda; penguin; pig face; rabbit face; snail; spider; spouting whale; tiger face;
tropical fish; turtle; unicorn
"""
_NATURE = """
cactus; cloud with lightning; crescent moon; deciduous tree; droplet; fire; four leaf clover; high voltage; maple leaf;
palm tree; rainbow; ringed planet; rose; snowflake; snowman; star; sun; sunflower; tulip; volcano
"""
_THINGS = """
alarm clock; anchor; backpack; balloon; basketball; bell; bicycle; bomb; bone; books; bullseye; camera; candle; crown;
crystal ball; envelope; eye; floppy disk; game die; gear; gem stone; graduation cap; guitar; headphone; hourglass done;
house; key; laptop; light bulb; lipstick; locked; magnet; magnifying glass tilted left; microphone; money bag;
musical note; necktie; pencil; puzzle piece; red heart; scissors; shield; soccer ball; sunglasses; t shirt; telephone;
television; tooth; top hat; trophy; umbrella; wrapped gift
"""
_PLACES = """
ambulance; automobile; bus; castle; ferris wheel; flying saucer; helicopter; moai; rocket; sailboat; tent;
vertical traffic light
"""
_FACES_AND_SIGNS = """
alien; angry face; clown face; ghost; jack o lantern; pile of poo; robot; skull; smiling face with sunglasses;
check mark button; cross mark; footprints; no entry; radioactive; red question mark; thumbs up; warning; yin yang
"""
# Names that only an adapter of content teaches; neither base nor target has seen them.
_CONCEPTS = "desert island; dolphin; infinity; ladder; peace symbol; teddy bear; tractor; wrench"


def _split(text: str) -> list[str]:
    return [name.strip() for name in text.replace("\n", " ").split(";")]


_GROUPS = (_FOOD, _ANIMALS, _NATURE, _THINGS, _PLACES, _FACES_AND_SIGNS)
NAMES = sorted(name for group in _GROUPS for name in _split(group))
CONCEPTS = sorted(_split(_CONCEPTS))
