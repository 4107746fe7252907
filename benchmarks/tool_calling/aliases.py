"""Other names of the tools, for training: a model that knows names by heart calls what is not on offer."""

import random
from collections.abc import Callable
from dataclasses import replace
from types import FunctionType

from benchmarks.tool_calling.lookups import LOOKUPS

ALIASES = {
    "add": ("sum_of", "plus"), "subtract": ("minus", "difference"), "divide": ("quotient", "split_number"),
    "power": ("raise_to", "exponentiate"), "convert_length": ("change_length_unit", "length_in"),
    "reverse_text": ("backwards", "flip_text"), "count_letter": ("letter_count", "occurrences"),
    "find_price": ("price_of", "item_cost"), "travel_time": ("train_time", "hours_by_train"),
    "multiply": ("times", "product"), "larger": ("maximum", "bigger_of"), "percentage": ("percent_of", "share_of"),
    "convert_weight": ("change_weight_unit", "weight_in"), "population": ("inhabitants", "people_in"),
    "time_zone": ("hours_from_utc", "zone_of"), "museums": ("museum_count", "museums_of"),
    "dialling_code": ("area_code", "prefix_of"), "mayor": ("mayor_of", "head_of_city"),
    "hotel_price": ("room_price", "hotel_cost"), "bus_fare": ("bus_ticket", "bus_price"),
    "capital": ("capital_of", "main_city"), "currency": ("money_of", "currency_of"),
    "word_length": ("letters_in", "length_of_word"), "upper_case": ("capitals", "big_letters"),
    "repeat_text": ("say_again", "repeated"), "synonym": ("same_meaning", "similar_word"),
    "translate": ("in_language", "translation"), "stock": ("in_stock", "pieces_left"), "order": ("buy", "place_order"),
    "set_alarm": ("wake_at", "alarm"), "call_person": ("phone", "ring_up"), "birthday": ("born_on", "birthday_of"),
    "days_in": ("month_length", "day_count"),
}  # fmt: skip
ALIASES |= {name: lookup.aliases for name, lookup in LOOKUPS.items()}


def aliased(functions: dict[str, Callable]) -> dict[str, Callable]:
    """The functions by all their names, each with the name that it is found by."""
    others = {alias: _named(functions[name], alias) for name in functions for alias in ALIASES.get(name, ())}
    return functions | others


def renamed(questions: list, rng: random.Random) -> list:
    """Each `Question` with one name for each tool on offer, in two of three cases another one than the tool's own.

    The same tools are on offer for all `questions`.
    """
    chosen = {name: rng.choice((name, *ALIASES.get(name, ()))) for name in questions[0].offered}
    offered = tuple(chosen.values())
    turns = [tuple(tuple((chosen[name], given) for name, given in turn) for turn in one.turns) for one in questions]
    return [replace(one, offered=offered, turns=its) for one, its in zip(questions, turns, strict=True)]


def _named(function: Callable, name: str) -> Callable:
    copy = FunctionType(function.__code__, function.__globals__, name, function.__defaults__, function.__closure__)
    copy.__doc__, copy.__annotations__, copy.__module__ = (
        function.__doc__,
        function.__annotations__,
        function.__module__,
    )
    return copy
