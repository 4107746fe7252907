"""Tools that are trained and never tested, so that a model learns to read what is on offer and not ten names by heart.

`TRAINING_TOOLS` has for each its wordings and how its arguments are drawn.
"""

import random
from collections.abc import Callable
from typing import Literal, NamedTuple

from benchmarks.tool_calling.lookups import LOOKUPS, function_of, number_of
from benchmarks.tool_calling.vocabulary import PEOPLE, TRAIN_CITIES, TRAIN_ITEMS, TRAIN_WORDS
from benchmarks.tool_calling.wordings import made_up_or, number_pair

COUNTRIES = ("France", "Spain", "Italy", "Norway", "Austria", "Ireland", "Portugal", "Poland", "Greece", "Denmark")
MONTHS = ("January", "February", "March", "April", "May", "June", "July", "August", "September", "October")
GRAMS = {"g": 1.0, "kg": 1000.0, "pound": 453.592}


class Trained(NamedTuple):
    """A tool with how it is asked for and what with."""

    function: Callable
    wordings: tuple[str, ...]
    arguments: Callable[[random.Random], dict]


def multiply(first: int, second: int) -> int:
    """Multiply two numbers: their product, one times the other.

    Args:
        first: A number.
        second: Another number.
    """
    return first * second


def larger(x: int, y: int) -> int:
    """Compare two numbers: which one is larger, bigger or greater, the maximum.

    Args:
        x: A number.
        y: Another number.
    """
    return max(x, y)


def percentage(percent: int, number: int) -> float:
    """Compute a percentage: so many percent of a number.

    Args:
        percent: How many percent.
        number: Of what.
    """
    return percent * number / 100


def convert_weight(amount: int, unit: Literal["g", "kg", "pound"], wanted: Literal["g", "kg", "pound"]) -> float:
    """Convert a weight or mass from one unit to another, such as g to kg.

    Args:
        amount: The weight.
        unit: Its unit.
        wanted: The wanted unit.
    """
    return round(amount * GRAMS[unit] / GRAMS[wanted], 3)


def population(city: str) -> int:
    """Look up the population of a city: how many people live there, its inhabitants.

    Args:
        city: The city.
    """
    return 1000 * number_of(city, 900)


def time_zone(place: str) -> str:
    """Look up the time zone of a city: its hours from UTC.

    Args:
        place: The city.
    """
    return f"UTC+{number_of(place, 3)}"


def museums(city: str) -> int:
    """Count the museums in a city: how many there are.

    Args:
        city: The city.
    """
    return number_of(city, 40)


def dialling_code(place: str) -> str:
    """Look up the dialling code of a city: what to dial before a telephone number there.

    Args:
        place: The city.
    """
    return f"0{number_of(place, 900) + 100}"


def mayor(town: str) -> str:
    """Look up the mayor of a city: who governs it.

    Args:
        town: The city.
    """
    return PEOPLE[number_of(town, len(PEOPLE))]


def hotel_price(city: str, nights: int) -> int:
    """Look up the price of a hotel: what a room in a city costs for some nights.

    Args:
        city: Where the hotel is.
        nights: How many nights.
    """
    return nights * (50 + number_of(city, 90))


def bus_fare(start: str, end: str) -> int:
    """Look up the bus fare: what a ticket for the bus from one place to another costs.

    Args:
        start: Where the bus leaves.
        end: Where it arrives.
    """
    return 5 + (2 * number_of(start, 1000) + number_of(end, 1000)) % 30


def capital(country: str) -> str:
    """Look up the capital of a country: the city of its government.

    Args:
        country: The country.
    """
    return TRAIN_CITIES[number_of(country, len(TRAIN_CITIES))]


def currency(country: str) -> str:
    """Look up the currency of a country: the money to pay with there.

    Args:
        country: The country.
    """
    return ("euro", "krone", "crown")[number_of(country, 3)]


def word_length(word: str) -> int:
    """Measure the length of a word: how many letters it has in all.

    Args:
        word: The word.
    """
    return len(word)


def upper_case(text: str) -> str:
    """Write a text or word in capital letters: in upper case, in big letters.

    Args:
        text: The text.
    """
    return text.upper()


def repeat_text(text: str, times: int) -> str:
    """Repeat a text or word: write or say it several times.

    Args:
        text: The text.
        times: How often.
    """
    return " ".join([text] * min(times, 9))


def synonym(word: str) -> str:
    """Find a synonym of a word: another word that means the same.

    Args:
        word: The word.
    """
    return TRAIN_WORDS[number_of(word, len(TRAIN_WORDS))]


def translate(word: str, language: Literal["French", "German", "Latin"]) -> str:
    """Translate a word into a language: how it is said there.

    Args:
        word: The word.
        language: Into which language.
    """
    return word + {"French": "e", "German": "en", "Latin": "us"}[language]


def stock(item: str) -> int:
    """Look up the stock of an item: how many pieces of it are left in the shop.

    Args:
        item: The item.
    """
    return number_of(item, 60)


def order(item: str, count: int) -> str:
    """Order an item: buy some pieces of it and have them sent.

    Args:
        item: The item.
        count: How many.
    """
    return f"{count} x {item} ordered"


def set_alarm(hour: int, minute: int) -> str:
    """Set an alarm: ring or wake somebody at a time.

    Args:
        hour: The hour, 0 to 23.
        minute: The minute, 0 to 59.
    """
    return f"alarm at {hour}:{minute:02d}"


def call_person(name: str) -> str:
    """Call a person: phone or ring somebody to talk.

    Args:
        name: Whom.
    """
    return f"{name} does not answer"


def birthday(person: str) -> str:
    """Look up the birthday of a person: the day somebody was born.

    Args:
        person: Who.
    """
    return f"{MONTHS[number_of(person, len(MONTHS))]} {1 + number_of(person, 28)}"


def days_in(month: str) -> int:
    """Count the days of a month: how long it is.

    Args:
        month: The month.
    """
    return 28 + number_of(month, 4)


def _two(
    first: str, second: str, low: tuple[int, int] = (2, 2), high: tuple[int, int] = (99, 99)
) -> Callable[[random.Random], dict]:
    ranges = tuple(zip(low, high, strict=True))
    return lambda rng: dict(zip((first, second), number_pair(rng, False, *ranges), strict=True))


def _one_of(name: str, values: tuple[str, ...]) -> Callable[[random.Random], dict]:
    return lambda rng: {name: rng.choice(values)}


def _copied(name: str, values: tuple[str, ...]) -> Callable[[random.Random], dict]:
    return lambda rng: {name: made_up_or(rng, values)}


def _pair_of(first: str, second: str, values: tuple[str, ...]) -> Callable[[random.Random], dict]:
    return lambda rng: dict(zip((first, second), rng.sample(values, 2), strict=True))


def _copied_pair(first: str, second: str, values: tuple[str, ...]) -> Callable[[random.Random], dict]:
    return lambda rng: {name: made_up_or(rng, (one,)) for name, one in _pair_of(first, second, values)(rng).items()}


def _counted(name: str, values: tuple[str, ...], number: str, high: int = 9) -> Callable[[random.Random], dict]:
    return lambda rng: {name: made_up_or(rng, values), number: rng.randint(2, high)}


TRAINING_TOOLS = (
    Trained(
        multiply,
        ("What is {first} times {second}?", "Multiply {first} by {second}.", "{first} x {second}?",
         "I need the product of {first} and {second}.",
         "Work out {first} times {second}.",
         "{first} rows of {second} chairs: how many chairs?",
         "What do I get if I multiply {first} with {second}?"),
        _two("first", "second"),
    ),
    Trained(
        larger,
        ("Which is larger, {x} or {y}?", "Give me the bigger one of {x} and {y}.", "Is {x} or {y} the greater number?",
         "Compare {x} with {y}. Which one wins?",
         "The maximum of {x} and {y}?",
         "Is {x} more than {y}, or the other way round?"),
        _two("x", "y"),
    ),
    Trained(
        percentage,
        ("What is {percent} percent of {number}?", "Compute {percent} % of {number}.",
         "I get {percent} percent of {number}. How much is that?",
         "How much are {percent} percent of {number}?",
         "{percent} % out of {number}?",
         "They take {percent} percent off {number}. How much do they take?"),
        _two("percent", "number"),
    ),
    Trained(
        convert_weight,
        ("Convert {amount} {unit} to {wanted}.", "How many {wanted} are {amount} {unit}?",
         "It weighs {amount} {unit}. What is that in {wanted}?",
         "{amount} {unit} of flour, in {wanted}?",
         "Change {amount} {unit} to {wanted}.",
         "Tell me the weight of {amount} {unit} in {wanted}."),
        lambda rng: {"amount": rng.randint(2, 900), **_pair_of("unit", "wanted", tuple(GRAMS))(rng)},
    ),
    Trained(
        population,
        ("How many people live in {city}?", "What is the population of {city}?", "Is {city} a big city?",
         "Number of inhabitants of {city}?",
         "How large is the population of {city}?",
         "Count the people of {city}.",
         "How many live in {city}, roughly?"),
        _copied("city", TRAIN_CITIES),
    ),
    Trained(
        time_zone,
        ("Which time zone has {place}?", "What is the time zone in {place}?", "Tell me {place}'s time zone.",
         "Look up the time zone of {place}.",
         "By how many hours is {place} away from UTC?",
         "Time zone of {place}, please."),
        _copied("place", TRAIN_CITIES),
    ),
    Trained(
        museums,
        ("How many museums are there in {city}?", "Museums in {city}, how many?", "Does {city} have many museums?",
         "I like museums. How many are in {city}?",
         "Count the museums of {city}.",
         "Number of museums in {city}?"),
        _copied("city", TRAIN_CITIES),
    ),
    Trained(
        dialling_code,
        ("What is the dialling code of {place}?", "Which code do I dial for {place}?", "Code for calls to {place}?",
         "I want to telephone to {place}. What is the code?",
         "Look up the dialling code for {place}.",
         "What do I dial before a number in {place}?"),
        _copied("place", TRAIN_CITIES),
    ),
    Trained(
        mayor,
        ("Who is the mayor of {town}?", "Who governs the city of {town}?", "Name the mayor of {town}.",
         "Tell me who is mayor in {town}.",
         "Mayor of {town}?",
         "Whom did they elect as mayor in {town}?"),
        _copied("town", TRAIN_CITIES),
    ),
    Trained(
        hotel_price,
        ("What does a hotel in {city} cost for {nights} nights?", "I stay {nights} nights in {city}. Hotel price?",
         "Price of {nights} hotel nights in {city}, please.",
         "How much do I pay for a hotel in {city}, {nights} nights?",
         "We need a room in {city} for {nights} nights. What is the cost?",
         "Look up the hotel price in {city} for {nights} nights."),
        _counted("city", TRAIN_CITIES, "nights"),
    ),
    Trained(
        bus_fare,
        ("What is the bus fare from {start} to {end}?", "How much is a bus ticket to {end} from {start}?",
         "I take the bus from {start} to {end}. What do I pay?",
         "Bus ticket {start} to {end}: price?",
         "What does it cost to go by bus from {start} to {end}?",
         "Look up the fare of the bus to {end}. It leaves in {start}."),
        _copied_pair("start", "end", TRAIN_CITIES),
    ),
    Trained(
        capital,
        ("What is the capital of {country}?", "Which city is {country}'s capital?", "Capital of {country}?",
         "In which city is the government of {country}?",
         "Tell me the capital of {country}.",
         "I forgot the capital of {country}."),
        _one_of("country", COUNTRIES),
    ),
    Trained(
        currency,
        ("What money do they have in {country}?", "Which currency has {country}?", "How do I pay in {country}?",
         "Currency of {country}?",
         "With what money do I pay in {country}?",
         "Tell me the currency of {country}."),
        _one_of("country", COUNTRIES),
    ),
    Trained(
        word_length,
        ("How long is the word {word}?", "How many letters does {word} have?", "Count all letters of {word}.",
         "Length of the word {word}?",
         "Of how many letters is {word} made?",
         "Tell me how long {word} is."),
        _copied("word", TRAIN_WORDS),
    ),
    Trained(
        upper_case,
        ("Write {text} in capital letters.", "Put {text} into upper case.", "Make {text} all capitals.",
         "Shout {text}.",
         "Show {text} in big letters.",
         "Give me {text} in upper case."),
        _copied("text", TRAIN_WORDS),
    ),
    Trained(
        repeat_text,
        ("Write {text} {times} times.", "Repeat the word {text} {times} times.", "Say {text} {times} times.",
         "Print {text} {times} times in a row.",
         "I want to see {text} {times} times.",
         "Copy {text} until you have it {times} times."),
        _counted("text", TRAIN_WORDS, "times"),
    ),
    Trained(
        synonym,
        ("What is another word for {word}?", "Find a synonym of {word}.", "Which word means the same as {word}?",
         "Replace {word} by a similar word.",
         "Tell me a synonym for {word}.",
         "I need another way to say {word}."),
        _copied("word", TRAIN_WORDS),
    ),
    Trained(
        translate,
        ("What is {word} in {language}?", "Translate {word} into {language}.", "How do you say {word} in {language}?",
         "Give me the {language} word for {word}.",
         "{language} for {word}?",
         "I need {word} in {language}."),
        lambda rng: {"word": made_up_or(rng, TRAIN_WORDS), "language": rng.choice(("French", "German", "Latin"))},
    ),
    Trained(
        stock,
        ("How many pieces of {item} are in stock?", "Is there a {item} left in the shop?",
         "Do you still have the {item}?",
         "Count the {item} in stock.",
         "How many of the {item} does the shop have?",
         "Look into the store: any {item} there?"),
        _copied("item", TRAIN_ITEMS),
    ),
    Trained(
        order,
        ("Order {count} pieces of {item}.", "I want to buy {count} of the {item}.",
         "Send me the {item}, {count} times.",
         "Get me {count} of the {item}.",
         "I take {count}, and the item is the {item}.",
         "Please place an order: {item}, {count} pieces."),
        _counted("item", TRAIN_ITEMS, "count"),
    ),
    Trained(
        set_alarm,
        ("Wake me at {hour}:{minute}.", "Set an alarm for {hour} hours and {minute} minutes.",
         "Let it ring at {hour}:{minute}.",
         "I must get up at {hour}:{minute}.",
         "Alarm for {hour}:{minute}, please.",
         "Put the alarm clock to {hour}:{minute}."),
        _two("hour", "minute", (5, 10), (23, 59)),
    ),
    Trained(
        call_person,
        ("Call {name}.", "Please phone {name}.", "I want to talk to {name}.", "Get {name} on the telephone.",
         "Give {name} a ring.",
         "I must speak with {name} on the phone.",
         "Dial the number of {name}."),
        _copied("name", PEOPLE),
    ),
    Trained(
        birthday,
        ("When is {person}'s birthday?", "On which day was {person} born?", "Birthday of {person}?",
         "Which day is the birthday of {person}?",
         "When does {person} turn a year older?",
         "Tell me when {person} has birthday."),
        _copied("person", PEOPLE),
    ),
    Trained(
        days_in,
        ("How many days does {month} have?", "How long is the month of {month}?", "Days of {month}?",
         "Count the days in {month}.",
         "How many days are in {month}?",
         "Is {month} a long month? How many days?"),
        _one_of("month", MONTHS),
    ),
)  # fmt: skip
_VALUES = {"city": TRAIN_CITIES, "place": TRAIN_CITIES, "person": PEOPLE, "item": TRAIN_ITEMS}
TRAINING_TOOLS += tuple(
    Trained(function_of(name), lookup.wordings, _copied(lookup.of, _VALUES[lookup.of]))
    for name, lookup in LOOKUPS.items()
)
