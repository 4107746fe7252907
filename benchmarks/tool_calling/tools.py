"""Ten small tools. Some take arguments that are easily swapped, some fail on what they are given."""

from typing import Literal

from benchmarks.tool_calling.vocabulary import PRICES

KILOMETRES = {"m": 0.001, "km": 1.0, "mile": 1.609}


def add(a: int, b: int) -> int:
    """Add two numbers: their sum or total, how much they make together.

    Args:
        a: The first number.
        b: The second number.
    """
    return a + b


def subtract(minuend: int, subtrahend: int) -> int:
    """Subtract: take one number away from another, or find what is left of it, or the difference.

    Args:
        minuend: What is reduced.
        subtrahend: What is taken away.
    """
    return minuend - subtrahend


def divide(dividend: int, divisor: int) -> str:
    """Divide whole numbers: share or split a number into equal parts, or find how often one fits into another.

    Args:
        dividend: What is divided.
        divisor: By what.
    """
    if divisor == 0:
        raise ValueError("divisor must not be 0")
    quotient, rest = divmod(dividend, divisor)
    return f"{quotient} remainder {rest}"


def power(base: int, exponent: int) -> int:
    """Raise a number to a power: a base to an exponent.

    Args:
        base: The number.
        exponent: The power.
    """
    if not 0 <= exponent <= 20:
        raise ValueError(f"exponent must be 0 to 20, got {exponent}")
    return base**exponent


def convert_length(value: int, source: Literal["m", "km", "mile"], target: Literal["m", "km", "mile"]) -> float:
    """Convert a length or distance from one unit to another, such as m to km.

    Args:
        value: The length.
        source: Its unit.
        target: The wanted unit.
    """
    return round(value * KILOMETRES[source] / KILOMETRES[target], 3)


def reverse_text(text: str) -> str:
    """Reverse a text or word: spell it backwards, turned around.

    Args:
        text: The text.
    """
    return text[::-1]


def count_letter(word: str, letter: str) -> int:
    """Count a letter in a word: how often it occurs, the number of times.

    Args:
        word: The word.
        letter: The letter.
    """
    if len(letter) != 1:
        raise ValueError(f"letter must be one character, got {letter}")
    return word.count(letter)


def find_price(item: str) -> int:
    """Look up the price of an item: what it costs, how much one pays for it.

    Args:
        item: The item.
    """
    if item not in PRICES:
        near = sorted((known for known in PRICES if known in item), key=len)
        raise ValueError(f"item is not in the list, got {item}" + (f"; use {near[-1]}" if near else ""))
    return PRICES[item]


def travel_time(origin: str, destination: str) -> str:
    """Look up how long the train takes from one city to another, in hours.

    Args:
        origin: From where.
        destination: To where.
    """
    for name, city in (("origin", origin), ("destination", destination)):
        if city[:1].islower():
            raise ValueError(f"{name} must begin with a capital letter, got {city}; use {city.capitalize()}")
    hours = (3 * sum(map(ord, origin)) + sum(map(ord, destination))) % 11 + 1
    return f"{hours} hours"


def weather(city: str) -> str:
    """Look up the weather in a city: whether the sun shines or it rains, and how warm it is.

    Args:
        city: The city.
    """
    return f"{('sunny', 'rainy', 'cloudy', 'windy')[sum(map(ord, city)) % 4]}, {sum(map(ord, city)) % 30} degrees"


TOOLS = (
    add, subtract, divide, power, convert_length, reverse_text, count_letter, find_price, travel_time, weather,
)  # fmt: skip
HELD_OUT = "weather"  # never trained
