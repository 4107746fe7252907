"""How questions are put, for training and for the test: no wording, word, city, item or number pair is in both."""

from benchmarks.tool_calling.tools import PRICES

TRAIN = {
    "add": ("What is {a} plus {b}?", "Add {a} and {b}.", "I need the sum of {a} and {b}.", "{a} + {b} = ?"),
    "subtract": (
        "Take {subtrahend} away from {minuend}.",
        "What is {minuend} minus {subtrahend}?",
        "Subtract {subtrahend} from {minuend}.",
        "How much is {minuend} less {subtrahend}?",
    ),
    "divide": (
        "Divide {dividend} by {divisor}.",
        "What is {dividend} divided by {divisor}?",
        "How often does {divisor} go into {dividend}?",
        "Split {dividend} into {divisor} equal parts.",
    ),
    "power": (
        "What is {base} to the power of {exponent}?",
        "Raise {base} to the power {exponent}.",
        "Compute {base}^{exponent}.",
    ),
    "convert_length": (
        "Convert {value} {source} to {target}.",
        "How many {target} are {value} {source}?",
        "What is {value} {source} in {target}?",
    ),
    "reverse_text": ("Spell {text} backwards.", "Reverse the word {text}.", "Write {text} from back to front."),
    "count_letter": (
        "How many {letter} are in {word}?",
        "Count the letter {letter} in {word}.",
        "In {word}, how often is there a {letter}?",
    ),
    "find_price": ("What does the {item} cost?", "How much is a {item}?", "Tell me the price of the {item}."),
    "travel_time": (
        "How long is the train from {origin} to {destination}?",
        "I go to {destination} from {origin} by train. How long does it take?",
        "Train time from {origin} to {destination}?",
    ),
}
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

CHAT_TRAIN = (
    "Hello!", "Who are you?", "Tell me a joke.", "What is your favourite colour?", "Thank you very much.",
    "Write a short poem.", "Good morning.", "What can you do?", "How are you today?", "Is the sky blue?",
    "Name a fruit.", "Say something nice.", "Do you like winter?", "Good night.", "Tell me about dogs.",
    "What is a river?", "Are you a robot?", "Give me some advice.",
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
TRAIN_ITEMS, TEST_ITEMS = tuple(PRICES)[:10], tuple(PRICES)[10:]
