"""How questions are put, for training and for the test: no wording, word, city, item or number pair is in both."""

import random
import re

from benchmarks.tool_calling.tools import PRICES

TRAIN = {
    "add": (
        "What is {a} plus {b}?", "Add {a} and {b}.", "I need the sum of {a} and {b}.", "{a} + {b} = ?",
        "What do {a} and {b} come to?", "Put {a} and {b} together.", "I have {a} and get {b} more. How many is that?",
        "Total of {a} and {b}?", "{a} and {b} in all?", "Increase {a} by {b}.",
    ),
    "subtract": (
        "Take {subtrahend} away from {minuend}.", "What is {minuend} minus {subtrahend}?",
        "What is left if I subtract {subtrahend} from {minuend}?", "How much is {minuend} less {subtrahend}?",
        "{minuend} - {subtrahend} = ?", "I had {minuend} and lost {subtrahend}. How many remain?",
        "Lower {minuend} by {subtrahend}.", "Of {minuend}, {subtrahend} are gone. How many are there now?",
        "I owe {minuend} and pay {subtrahend}. What do I still owe?",
        "Please subtract the number {subtrahend} from {minuend}.",
    ),
    "divide": (
        "Divide {dividend} by {divisor}.", "What is {dividend} divided by {divisor}?",
        "How often does {divisor} go into {dividend}?", "Split {dividend} into {divisor} equal parts.",
        "{dividend} / {divisor} = ?", "Hand out {dividend} sweets to {divisor} children. How many does each get?",
        "Put {dividend} books into {divisor} boxes.", "Distribute {dividend} over {divisor} groups.",
        "What is {dividend} over {divisor}?", "{divisor} friends split {dividend} coins.",
    ),
    "power": (
        "What is {base} to the power of {exponent}?", "Raise {base} to the power {exponent}.",
        "Compute {base}^{exponent}.", "{base} ** {exponent} = ?", "What is the {exponent}th power of {base}?",
        "Take {base} to the {exponent}.", "Multiply {base} by itself, {exponent} factors in all.",
        "Exponent {exponent}, base {base}: what comes out?", "{base} with exponent {exponent}?",
    ),
    "convert_length": (
        "Convert {value} {source} to {target}.", "How many {target} are {value} {source}?",
        "What is {value} {source} in {target}?", "Change {value} {source} into {target}.",
        "I walked {value} {source}. How many {target} is that?", "{value} {source}, how many {target}?",
        "Write {value} {source} as {target}.", "The road has {value} {source}. Tell me the {target}.",
        "How far is {value} {source}, measured in {target}?", "Turn {value} {source} into {target}.",
    ),
    "reverse_text": (
        "Spell {text} backwards.", "Reverse the word {text}.", "Write {text} from back to front.",
        "What does {text} look like backwards?", "Flip the letters of {text}.", "{text} from the end to the start?",
        "Read {text} from right to left.", "Mirror the word {text}.", "Give me {text} with its letters reversed.",
    ),
    "count_letter": (
        "How many {letter} are in {word}?", "Count the letter {letter} in {word}.",
        "In {word}, how often is there a {letter}?", "How many times does {word} have the letter {letter}?",
        "Number of {letter} in {word}?", "Count every {letter} of the word {word}.",
        "Does {word} have a {letter}, and how many?", "Tell me how often I write {letter} when I write {word}.",
        "The letter {letter}: how many of them has {word}?",
    ),
    "find_price": (
        "What does the {item} cost?", "How much is a {item}?", "Tell me the price of the {item}.",
        "What is the price of a {item}?", "How expensive is the {item}?", "I want a {item}. What do I have to pay?",
        "Price for a {item}, please.", "What must I spend on a {item}?", "Check the price of a {item}.",
        "What do you charge for a {item}?",
    ),
    "travel_time": (
        "How long is the train from {origin} to {destination}?",
        "I go to {destination} from {origin} by train. How long does it take?",
        "Train time from {origin} to {destination}?", "How long does the train need to {destination} from {origin}?",
        "I live in {origin} and take the train to {destination}. How long do I sit in it?",
        "By train from {origin} to {destination}: how many hours?", "Travel time {origin} to {destination}, please.",
        "When I leave {origin}, how much later does my train arrive in {destination}?",
        "How long does a trip by rail to {destination} last if I start in {origin}?",
    ),
}  # fmt: skip
BEFORE = ("", "", "", "", "Please tell me: ", "Hi! ", "One question. ", "Quickly: ", "Can you help? ", "Excuse me. ")
AFTER = ("", "", "", "", " Thanks!", " I need it today.", " Please.", " Thank you.")
TEST = {
    "add": ("Please sum up {a} and {b}.", "How much do {a} and {b} make together?"),
    "subtract": ("Remove {subtrahend} from {minuend}.", "I have {minuend} and give away {subtrahend}. What is left?"),
    "divide": ("Share {dividend} among {divisor} people.", "How many times does {divisor} fit into {dividend}?"),
    "power": ("Calculate {base} raised to {exponent}.", "{base} to the {exponent}th power, please."),
    "convert_length": ("Express {value} {source} in {target}.", "I have {value} {source}. Give it to me in {target}."),
    "reverse_text": ("What is {text} spelled in reverse?", "Turn the word {text} around."),
    "count_letter": ("How often does {letter} occur in {word}?", "Find the number of {letter} in the word {word}."),
    "find_price": ("How much would I pay for a {item}?", "Look up what a {item} costs."),
    "travel_time": (
        "How many hours is the train ride from {origin} to {destination}?",
        "How long does it take to reach {destination} by train from {origin}?",
    ),
    "weather": (
        "How is the weather in {city}?",
        "What is the weather like in {city} today?",
        "Weather in {city}, please.",
        "Is it sunny in {city}?",
    ),
}

# Of several pieces of an item, which the price list does not know by this name.
PLURAL_TRAIN = (
    "What do the {item} cost?", "How much are {item}?", "Tell me the price of the {item}.",
    "What is the price of {item}?", "How expensive are the {item}?", "I want {item}. What do I have to pay?",
    "Price for {item}, please.", "What must I spend on {item}?", "Check the price of {item}.",
    "What do you charge for {item}?",
)  # fmt: skip
PLURAL_TEST = ("How much would I pay for {item}?", "Look up what {item} cost.")

CHAT_TRAIN = (
    "Hello!", "Who are you?", "I want to hear a joke.", "What is your favourite colour?", "Thank you very much.",
    "Write a short poem.", "I wish you a good morning.", "What can you do?", "How are you today?",
    "Why is the sky blue?", "Which fruit is sweet?", "Say something nice.", "Winter is cold, isn't it?", "Sleep well.",
    "Why do dogs bark?", "Explain to me how rivers form.", "Is there a robot inside you?", "Give me some advice.",
    "Which book did you read last?", "Do you have a secret?", "I like flowers.", "Snow is white.", "Hey, what is up?",
    "Why do we build bridges?", "Are you happy?", "Thanks, that was kind.", "Make up a sentence with the word rain.",
    "What do you think of me?", "How old are you?", "Describe a bird to me.", "My sister says goodbye.",
    "Shall we have some tea?", "I have nothing to play.", "What do people do at school?", "Show me how you dance.",
    "Bye for now.", "I feel sad.", "I am bored.", "My day was long.", "Nice to meet you.",
)  # fmt: skip
CHAT_TEST = (
    "Good evening!", "Do you like music?", "Tell me a story.", "Name an animal.", "Is grass green?", "Hi there.",
    "What is a mountain?", "Are you a person?", "Thanks a lot for the help.", "Write a line about the sea.",
    "How do you feel?", "What is your name?", "Tell me about cats.", "Say hello to my friend.", "Do you like summer?",
    "Recommend a hobby.", "What is a library?", "Can you sing?", "See you tomorrow.", "Tell me something funny.",
)  # fmt: skip
NEEDS_NONE = "No tool is needed for that. How can I help you?"
NONE_FITS = "I have no tool for that."

TRAIN_CITIES = (
    "Paris", "London", "Berlin", "Madrid", "Rome", "Oslo", "Vienna", "Dublin", "Prague", "Lisbon", "Warsaw", "Zurich",
    "Milan", "Brussels", "Hamburg", "Munich",
)  # fmt: skip
TEST_CITIES = (
    "Athens", "Helsinki", "Geneva", "Budapest", "Naples", "Lyon", "Krakow", "Porto", "Bergen", "Riga",
    "Tallinn", "Bilbao", "Utrecht", "Bordeaux",
)  # fmt: skip
TRAIN_WORDS = (
    "market", "window", "garden", "yellow", "planet", "silver", "button", "hammock", "kitchen", "letter", "morning",
    "number", "orange", "pepper", "quarter", "rabbit", "summer", "tomato", "valley", "winter", "bottle", "castle",
    "doctor", "engine", "flower", "guitar", "harbour", "island", "jacket", "ladder", "mirror", "needle", "ocean",
    "pocket", "railway", "saddle", "teacher", "uncle", "village", "wallet", "answer", "bridge", "cotton", "dinner",
    "entrance", "forest", "ginger", "honey", "insect", "journey", "kettle", "lemon", "museum", "nephew", "office",
    "paper", "queen", "river", "station", "thunder", "umbrella", "violin", "weekend", "animal", "butter", "candle",
    "desert", "eleven", "feather", "glass", "hotel", "income", "jungle", "kingdom", "leather", "money", "nature",
    "onion", "parrot", "quality", "result", "shadow", "ticket", "useful", "velvet", "wooden", "zebra", "bicycle",
)  # fmt: skip
TEST_WORDS = (
    "banana", "letterbox", "message", "balloon", "history", "mountain", "balcony", "cucumber", "elephant", "football",
    "grammar", "hospital", "library", "machine", "notebook", "pattern", "question", "sandwich", "theatre", "universe",
    "volcano", "whisper", "bamboo", "carrot", "distance", "evening", "freedom", "gallery", "holiday", "lantern",
    "marble", "orchard", "pyramid", "receipt", "sentence", "tunnel", "vessel", "wisdom", "coconut", "meadow",
)  # fmt: skip
TRAIN_ITEMS, TEST_ITEMS = tuple(PRICES)[:10], tuple(PRICES)[10:]


def number_pair(rng: random.Random, test: bool, first: tuple[int, int], second: tuple[int, int]) -> tuple[int, int]:
    """Two numbers from two ranges, of which the test has every fifth pair and training the others."""
    while True:
        a, b = rng.randint(*first), rng.randint(*second)
        if ((7 * a + b) % 5 == 0) == test:
            return a, b


def words_apart(one: str, other: str) -> int:
    """How many words must be changed, added or left out to make one wording the other; all slots are equal."""
    a, b = (re.findall(r"\*|\w+", re.sub(r"\{\w+\}", "*", text.lower())) for text in (one, other))
    row = list(range(len(b) + 1))
    for i, word in enumerate(a, 1):
        last, row[0] = row[0], i
        for j, its in enumerate(b, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (word != its))
    return row[-1]
