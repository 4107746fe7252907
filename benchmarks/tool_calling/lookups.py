"""Small tools that look one thing up and are trained, never tested: many, so that a new one is read, too.

`LOOKUPS` has for each its other names, its description, the wordings, and what it returns. Some wordings do not say
the name of what is asked for.
"""

from collections.abc import Callable
from typing import NamedTuple


class Lookup(NamedTuple):
    """A tool of one argument.

    Attributes:
        of: The argument: a key of `ARGUMENTS`.
        aliases: Other names.
        description: Its docstring without the arguments.
        results: One of them is the result.
        wordings: How it is asked for, with a slot for the argument.
    """

    of: str
    aliases: tuple[str, str]
    description: str
    results: tuple[str, ...]
    wordings: tuple[str, ...]


def number_of(text: str, below: int) -> int:
    """A number from 0 to `below` - 1, always the same for a text."""
    return sum(map(ord, text)) % below


def _looked_up(argument: str, text: str, results: tuple[str, ...]) -> str:
    if " (" in text:
        raise ValueError(f"{argument} must have no brackets, got {text}; use {text.split(' (')[0]}")
    return results[number_of(text, len(results))]


def _of_city(results: tuple[str, ...]) -> Callable:
    def tool(city: str) -> str:
        return _looked_up("city", city, results)

    return tool


def _of_place(results: tuple[str, ...]) -> Callable:
    def tool(place: str) -> str:
        return _looked_up("place", place, results)

    return tool


def _of_person(results: tuple[str, ...]) -> Callable:
    def tool(person: str) -> str:
        return _looked_up("person", person, results)

    return tool


def _of_item(results: tuple[str, ...]) -> Callable:
    def tool(item: str) -> str:
        return _looked_up("item", item, results)

    return tool


class Argument(NamedTuple):
    """An argument of tools.

    Attributes:
        make: Makes a function with this argument from the results.
        meaning: Its line in the docstring.
        refused: What stands in brackets after a value that the tool refuses.
    """

    make: Callable
    meaning: str
    refused: tuple[str, ...]


ARGUMENTS = {
    "city": Argument(_of_city, "The city.", ("by the sea", "the old town", "in the north")),
    "place": Argument(_of_place, "The city.", ("its centre", "in the south", "near the border")),
    "person": Argument(_of_person, "Who.", ("my aunt", "from work", "the tall one")),
    "item": Argument(_of_item, "The item.", ("a new one", "the large one", "in red")),
}


def function_of(name: str) -> Callable:
    """The tool with this key of `LOOKUPS`, with annotations and docstring."""
    lookup = LOOKUPS[name]
    argument = ARGUMENTS[lookup.of]
    function = argument.make(lookup.results)
    function.__name__ = function.__qualname__ = name
    function.__doc__ = f"{lookup.description}\n\nArgs:\n    {lookup.of}: {argument.meaning}\n"
    return function


LOOKUPS = {
    "river": Lookup(
        "city", ("river_of", "waters"), "Look up the river of a city: the water that flows through it.",
        ("the Elna", "the Maru", "the Tinde"),
        ("Which river flows through {city}?", "River of {city}?", "What water runs through {city}?",
         "I stand on a bridge in {city}. What is below me?", "Name the river of {city}.",
         "On which river does {city} lie?"),
    ),
    "airport": Lookup(
        "place", ("airport_code", "landing_place"), "Look up the airport of a city: its code, where planes land.",
        ("QXA", "QRB", "QTC", "QWD"),
        ("Which airport has {place}?", "Airport code of {place}?", "Where does a plane to {place} land?",
         "What do I write on my suitcase for {place}?", "I want to land in {place}. Where is that?",
         "Tell me the airport of {place}."),
    ),
    "traffic": Lookup(
        "city", ("road_state", "jams"), "Look up the traffic in a city: whether its roads are full or free.",
        ("free", "busy", "jammed"),
        ("Tell me about the traffic in {city}.", "Are the roads in {city} full?",
         "Will I get stuck in {city} with my car?",
         "Is it wise to drive into {city} at noon?", "How bad are the roads of {city} now?", "Is {city} jammed again?",
         "Do I need much patience on the streets of {city}?"),
    ),
    "parking": Lookup(
        "place", ("parking_fee", "car_park"), "Look up parking in a city: what an hour in a car park costs.",
        ("2 euros", "3 euros", "5 euros"),
        ("What does parking cost in {place}?", "Parking fee in {place}?",
         "Can I leave my car in {place}, and for how much?",
         "I drive to {place}. What does an hour of standing there cost?", "Look up parking in {place}."),
    ),
    "noise": Lookup(
        "city", ("loudness", "noise_in"), "Look up the noise in a city: how loud or quiet its streets are.",
        ("quiet", "loud", "very loud"),
        ("How loud is {city}?", "Is {city} a quiet city?", "Can I sleep in {city} with an open window?",
         "Noise in {city}?", "Do I need plugs for my ears in {city}?", "Is it loud in {city} at night?"),
    ),
    "founded": Lookup(
        "place", ("founding_year", "age_of_city"), "Look up the year in which a city was founded: how old it is.",
        ("1154", "1203", "1378", "1432"),
        ("How old is {place}?", "When was {place} founded?", "Since when do people live in {place}?",
         "In which year was {place} built?", "Founding year of {place}?", "Is {place} from the middle ages?"),
    ),
    "spoken": Lookup(
        "city", ("spoken_in", "language_of"), "Look up the language of a city: what its people speak.",
        ("French", "German", "Italian"),
        ("What do people speak in {city}?", "Which language is spoken in {city}?", "Language of {city}?",
         "What shall I learn before I move to {city}?", "How do I talk to people in {city}?"),
    ),
    "altitude": Lookup(
        "place", ("height_of", "metres_above_sea"), "Look up the altitude of a city: how high above the sea it lies.",
        ("34 metres", "210 metres", "518 metres"),
        ("How high is {place}?", "Altitude of {place}?", "How many metres above the sea is {place}?",
         "Do I have to climb to {place}?", "Is {place} in the mountains, and how high?"),
    ),
    "team": Lookup(
        "city", ("club_of", "local_team"), "Look up the football team of a city: who plays there.",
        ("the Lions", "the Bears", "the Falcons"),
        ("Which football team plays in {city}?", "Name the team of {city}.", "For whom do they cheer in {city}?",
         "Football in {city}: which club?", "Whose scarf should I wear in {city}?"),
    ),
    "dish": Lookup(
        "place", ("typical_food", "what_to_eat"), "Look up the dish of a city: what one eats there.",
        ("dumplings", "fish soup", "onion tart"),
        ("What do people eat in {place}?", "Typical dish of {place}?", "I am hungry in {place}. What is good there?",
         "Which food is {place} known for?", "What should be on my plate in {place}?"),
    ),
    "festival": Lookup(
        "city", ("next_festival", "celebration"), "Look up the next festival in a city: what is celebrated.",
        ("the wine days", "the night of lights", "the harvest fair"),
        ("Which festival is next in {city}?", "What do they celebrate in {city}?", "Is there a party in {city} soon?",
         "Festival in {city}?", "Why are there flags all over {city}?"),
    ),
    "tap_water": Lookup(
        "place", ("drinking_water", "water_from_tap"), "Look up the tap water of a city: whether one can drink it.",
        ("good", "not good"),
        ("Can I drink from the tap in {place}?", "Tap water in {place}, is it good?",
         "Is the tap water of {place} clean?",
         "Shall I take bottles along to {place}?", "What comes from the taps in {place}?"),
    ),
    "safety": Lookup(
        "city", ("crime", "how_safe"), "Look up the safety of a city: whether its streets are safe at night.",
        ("safe", "rather safe", "not safe"),
        ("Is {city} safe?", "How safe are the streets of {city}?", "Should I be afraid alone in {city} after dark?",
         "Tell me whether {city} is safe.", "Must I watch my purse in {city}?"),
    ),
    "opening_hours": Lookup(
        "place", ("shop_hours", "open_until"), "Look up the opening hours of the shops in a city: when they close.",
        ("until 18:00", "until 20:00", "until 22:00"),
        ("When do the shops in {place} close?", "Opening hours in {place}?", "Until when can I buy bread in {place}?",
         "Can I still go to a shop in {place} after work?", "How long are shops open in {place}?"),
    ),
    "job": Lookup(
        "person", ("works_as", "profession"), "Look up the job of a person: what somebody works as.",
        ("baker", "pilot", "nurse", "farmer"),
        ("What does {person} work as?", "What is the job of {person}?", "How does {person} earn money?",
         "What does {person} do all day?", "Job of {person}?"),
    ),
    "address": Lookup(
        "person", ("lives_at", "home_of"), "Look up the address of a person: where somebody lives.",
        ("5 Mill Lane", "12 Oak Street", "8 Hill Road"),
        ("Where does {person} live?", "What is the address of {person}?", "I send a card to {person}. Where to?",
         "To which house do I bring the parcel for {person}?", "Address of {person}?"),
    ),
    "age": Lookup(
        "person", ("years_of", "age_of"), "Look up the age of a person: how many years old somebody is.",
        ("19 years", "34 years", "61 years"),
        ("What is the age of {person}?", "How many years old is {person}?", "Is {person} a grown-up?",
         "How many candles does {person} need on the cake?", "Age of {person}?"),
    ),
    "weight_of": Lookup(
        "item", ("how_heavy", "item_weight"), "Look up the weight of an item: how heavy it is.",
        ("200 g", "3 kg", "14 kg"),
        ("How heavy is the {item}?", "What does the {item} weigh?", "Can I carry the {item} alone?",
         "Weight of a {item}?", "Is a {item} light enough for a child?"),
    ),
    "material": Lookup(
        "item", ("made_of", "stuff_of"), "Look up the material of an item: what it is made of.",
        ("wood", "steel", "cotton", "glass"),
        ("What is the {item} made of?", "Material of the {item}?", "Is the {item} of wood or of metal?",
         "Will the {item} break if it falls?", "Of which stuff is a {item}?"),
    ),
    "delivery": Lookup(
        "item", ("arrives_on", "delivery_day"), "Look up the delivery of an item: the day on which it arrives.",
        ("Monday", "Wednesday", "Saturday"),
        ("When does the {item} arrive?", "Delivery of the {item}?", "On which day do you bring the {item}?",
         "How long must I wait for the {item}?", "Should I be at home for the {item} this week?"),
    ),
    "colour": Lookup(
        "item", ("colour_of", "which_colour"), "Look up the colour of an item: how it looks.",
        ("red", "blue", "green", "black"),
        ("Which colour has the {item}?", "What colour is the {item}?", "Does the {item} go with a white wall?",
         "Colour of the {item}?", "Is the {item} red?"),
    ),
    "guarantee": Lookup(
        "item", ("guarantee_of", "warranty"), "Look up the guarantee of an item: how long one may bring it back.",
        ("1 year", "2 years", "5 years"),
        ("How long is the guarantee of the {item}?", "Guarantee for a {item}?",
         "What if the {item} is broken in a year?",
         "Until when can I bring the {item} back?", "Will you repair the {item} for free?"),
    ),
}  # fmt: skip
