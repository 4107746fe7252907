"""How questions are put, for training and for the test: no wording and no pair of numbers is in both."""

import random
import re

MADE_UP = 0.5  # of the words, cities and names of training

TRAIN = {
    "add": (
        "What is {a} plus {b}?", "Add {a} and {b}.", "I need the sum of {a} and {b}.", "{a} + {b} = ?",
        "What do {a} and {b} come to?", "Put {a} and {b} together.", "I have {a} and get {b} more. How many is that?",
        "Total of {a} and {b}?", "{a} and {b} in all?", "Increase {a} by {b}.", "Could you add {b} to {a}?",
        "What number do I get from {a} and {b}, added?", "Sum: {a}, {b}",
        "There were {a} guests, then {b} came. How many guests now?", "Work out {a} plus {b} for me.",
        "Find the sum of {a} and {b}.", "My two bills are {a} and {b}. What is the total?",
        "I read {a} pages and later {b} pages. How many pages was that?", "Give me {a} plus {b}.",
        "Count {a} and {b} together as one.", "What is the result of adding {a} to {b}?",
        "A box holds {a} nails, another holds {b}. How many nails do I own?", "Combine {a} with {b}.",
    ),
    "subtract": (
        "Take {subtrahend} away from {minuend}.", "What is {minuend} minus {subtrahend}?",
        "What is left if I subtract {subtrahend} from {minuend}?", "How much is {minuend} less {subtrahend}?",
        "{minuend} - {subtrahend} = ?", "I had {minuend} and lost {subtrahend}. How many remain?",
        "Lower {minuend} by {subtrahend}.", "Of {minuend}, {subtrahend} are gone. How many are there now?",
        "I owe {minuend} and pay {subtrahend}. What do I still owe?",
        "Please subtract the number {subtrahend} from {minuend}.",
        "By how much is {minuend} larger than {subtrahend}?", "Work out {minuend} minus {subtrahend}.",
        "Deduct the amount {subtrahend} from my {minuend}.", "The difference of {minuend} and {subtrahend}?",
        "Find {minuend} minus {subtrahend} for me.",
        "There were {minuend} birds and {subtrahend} flew off. How many stayed?",
        "I saved {minuend} and spent {subtrahend}. What do I still have?", "Reduce {minuend} by {subtrahend}.",
        "What remains of {minuend} without {subtrahend}?", "Make {minuend} smaller by {subtrahend}.",
        "{subtrahend} off {minuend}, please.",
        "My bag weighs {minuend} and I take out {subtrahend}. What does it weigh then?",
        "From {minuend}, drop {subtrahend}.",
        "{minuend} people waited and {subtrahend} went home. How many still wait?",
        "We ate {subtrahend} of {minuend} cakes. How many are there now?", "Count down from {minuend} by {subtrahend}.",
        "{subtrahend} of our {minuend} lamps broke. How many work?",
        "Somebody took {subtrahend} of my {minuend} pens. How many have I got?",
        "Out of {minuend} tickets I gave {subtrahend} to friends. How many can I use?",
    ),
    "divide": (
        "Divide {dividend} by {divisor}.", "What is {dividend} divided by {divisor}?",
        "How often does {divisor} go into {dividend}?", "Split {dividend} into {divisor} equal parts.",
        "{dividend} / {divisor} = ?", "Hand out {dividend} sweets to {divisor} children. How many does each get?",
        "Put {dividend} books into {divisor} boxes.", "Distribute {dividend} over {divisor} groups.",
        "What is {dividend} over {divisor}?", "{divisor} friends split {dividend} coins.",
        "How many groups of {divisor} are in {dividend}?", "Work out {dividend} divided by {divisor}.",
        "Cut {dividend} into {divisor} pieces of the same size.", "Find the quotient of {dividend} and {divisor}.",
        "I have {dividend} eggs and cartons for {divisor} each. How many cartons do I fill?",
        "What does each one get of {dividend} if there are {divisor} of us?",
        "Give {dividend} cards to {divisor} players, the same number for all.",
        "How many tables of {divisor} do {dividend} guests need?", "Dividing {dividend} by {divisor} gives what?",
        "Break {dividend} up by {divisor}.", "How often can I take {divisor} out of {dividend}?",
        "Deal {dividend} evenly to {divisor}.", "{dividend} split {divisor} ways?",
        "For {divisor} horses there are {dividend} apples. How many does one get?",
        "{divisor} workers earn {dividend} coins together. What does one earn?",
        "Among {divisor} teams, divide {dividend} points.", "A bus takes {divisor}. How many buses do {dividend} need?",
        "{divisor} heirs receive {dividend} acres. How many are for one?",
        "There are {divisor} of us and {dividend} cherries. What is a fair share?",
    ),
    "power": (
        "What is {base} to the power of {exponent}?", "Raise {base} to the power {exponent}.",
        "Compute {base}^{exponent}.", "{base} ** {exponent} = ?", "What is the {exponent}th power of {base}?",
        "Take {base} to the {exponent}.", "Multiply {base} by itself, {exponent} factors in all.",
        "Exponent {exponent}, base {base}: what comes out?", "{base} with exponent {exponent}?",
        "Work out {base} to the power of {exponent}.", "How large is {base} to the power {exponent}?",
        "{base} with {exponent} as its exponent, please.", "Find {base}^{exponent}.",
        "Give me the power {base}^{exponent}.", "The number {base}, taken {exponent} times as a factor?",
        "Exponentiate {base} with {exponent}.", "What comes out for {base} ** {exponent}?",
        "I need {base} to the power of {exponent}.", "Let the base be {base} and the exponent {exponent}. Compute it.",
        "Use {exponent} as the power of {base}.",
    ),
    "convert_length": (
        "Convert {value} {source} to {target}.", "How many {target} are {value} {source}?",
        "What is {value} {source} in {target}?", "Change {value} {source} into {target}.",
        "I walked {value} {source}. How many {target} is that?", "{value} {source}, how many {target}?",
        "Write {value} {source} as {target}.", "The road has {value} {source}. Tell me the {target}.",
        "How far is {value} {source}, measured in {target}?", "Turn {value} {source} into {target}.",
        "What would {value} {source} be in {target}?", "I ran {value} {source}. What is this in {target}?",
        "{value} {source} to {target}, please.", "Work out {value} {source} in {target}.",
        "The ship is {value} {source} away. Say that in {target}.",
        "Which length in {target} equals {value} {source}?", "Rewrite {value} {source} using {target}.",
        "If it is {value} {source}, what is it in {target}?", "{value} {source} equals how many {target}?",
        "My garden measures {value} {source}. And in {target}?", "Show {value} {source} as {target}.",
        "Translate a distance of {value} {source} to {target}.",
    ),
    "reverse_text": (
        "Spell {text} backwards.", "Reverse the word {text}.", "Write {text} from back to front.",
        "What does {text} look like backwards?", "Flip the letters of {text}.", "{text} from the end to the start?",
        "Read {text} from right to left.", "Mirror the word {text}.", "Give me {text} with its letters reversed.",
        "Print {text} in the opposite order.", "How is {text} written backwards?", "Give me the reverse of {text}.",
        "Read {text} from its last letter to its first.", "Letters of {text}, last one first?",
        "Switch the order of the letters in {text}.", "Please reverse {text}.",
        "What do I get when I read {text} backwards?", "Show {text} the wrong way round.",
        "I want {text} written backwards.", "Start with the last letter of {text} and go back.",
        "Backwards, what is {text}?", "Say {text} backwards.",
    ),
    "count_letter": (
        "How many {letter} are in {word}?", "Count the letter {letter} in {word}.",
        "In {word}, how often is there a {letter}?", "How many times does {word} have the letter {letter}?",
        "Number of {letter} in {word}?", "Count every {letter} of the word {word}.",
        "Does {word} have a {letter}, and how many?", "Tell me how often I write {letter} when I write {word}.",
        "The letter {letter}: how many of them has {word}?", "How many times do I see {letter} in {word}?",
        "How many letters {letter} has the word {word}?", "Look at {word}: how many {letter} do you see?",
        "What is the count of {letter} in {word}?", "How frequent is {letter} in {word}?",
        "In the word {word}, count each {letter}.", "Check {word} for the letter {letter}. How many are there?",
        "How often does the word {word} use {letter}?", "How often is {letter} part of {word}?",
        "Tell me the number of times {letter} is in {word}.", "How many of the letters of {word} are {letter}?",
        "Is {letter} in {word} once or more often?", "How often do you meet the letter {letter} in {word}?",
        "How often can you read {letter} in {word}?", "Search the word {word} for {letter} and count.",
        "Find each {letter} of {word}. How many did you find?",
    ),
    "find_price": (
        "What does the {item} cost?", "How much is a {item}?", "Tell me the price of the {item}.",
        "What is the price of a {item}?", "How expensive is the {item}?", "I want a {item}. What do I have to pay?",
        "Price for a {item}, please.", "What must I spend on a {item}?", "Check the price of a {item}.",
        "What do you charge for a {item}?", "What would a {item} cost me?",
        "I am looking for a {item}. How much is it?", "Is the {item} expensive?", "Find the price of a {item}.",
        "Which price has the {item}?", "For how much do you sell the {item}?",
        "How much money do I need for a {item}?", "What is a {item} worth in your shop?",
        "My mother needs a {item}. What is the price?", "Name the price of the {item}.",
        "How much does a {item} cost?", "Can you tell me what a {item} costs?", "Search for the price of the {item}.",
        "What does the shop want for a {item}?",
    ),
    "travel_time": (
        "How long is the train from {origin} to {destination}?",
        "I go to {destination} from {origin} by train. How long does it take?",
        "Train time from {origin} to {destination}?", "How long does the train need to {destination} from {origin}?",
        "I live in {origin} and take the train to {destination}. How long do I sit in it?",
        "By train from {origin} to {destination}: how many hours?", "Travel time {origin} to {destination}, please.",
        "When I leave {origin}, how much later does my train arrive in {destination}?",
        "How long does a trip by rail to {destination} last if I start in {origin}?",
        "How long does the train take from {origin} to {destination}?",
        "I travel by rail from {origin} to {destination}. How long is that?",
        "What is the travel time by train between {origin} and {destination}, going to {destination}?",
        "How much time does the train from {origin} to {destination} take?",
        "Time on the train if I go to {destination} and start in {origin}?",
        "We take the train in {origin} and get off in {destination}. How long are we on it?",
        "My train leaves {origin} for {destination}. How long will it travel?",
        "How many hours must I sit in the train from {origin} until {destination}?",
        "I am in {origin} and want to see {destination}. How long is the train trip?",
        "Look up the train time to {destination} from {origin}.",
        "How soon is a train from {origin} in {destination}?", "From {origin} to {destination} on rails, how long?",
        "Going from {origin} to {destination} by train takes how long?",
    ),
}  # fmt: skip
BEFORE = ("", "", "", "", "Please tell me: ", "Hi! ", "One question. ", "Quickly: ", "Can you help? ", "Excuse me. ")
AFTER = ("", "", "", "", " Thanks!", " I need it today.", " Please.", " Thank you.")
TEST = {
    "add": (
        "Please sum up {a} and {b}.", "How much do {a} and {b} make together?",
        "Which number results when {a} and {b} are added?",
        "One shelf has {a} books, another has {b}. How many books altogether?",
    ),
    "subtract": (
        "Remove {subtrahend} from {minuend}.", "I have {minuend} and give away {subtrahend}. What is left?",
        "Start at {minuend} and go down by {subtrahend}.",
        "Of my {minuend} stamps, {subtrahend} were sold. What do I keep?",
    ),
    "divide": (
        "Share {dividend} among {divisor} people.", "How many times does {divisor} fit into {dividend}?",
        "Divide {dividend} marbles fairly among {divisor} boys.",
        "If {divisor} people share {dividend} euros, how much has each?",
    ),
    "power": (
        "Calculate {base} raised to {exponent}.", "{base} to the {exponent}th power, please.",
        "Evaluate {base} with {exponent} as its power.", "Which value has {base} with an exponent of {exponent}?",
    ),
    "convert_length": (
        "Express {value} {source} in {target}.", "I have {value} {source}. Give it to me in {target}.",
        "The bridge is {value} {source} long. How long is that in {target}?",
        "Please give {value} {source} in the unit {target}.",
    ),
    "reverse_text": (
        "What is {text} spelled in reverse?", "Turn the word {text} around.",
        "Put the letters of {text} in reverse order.", "How does {text} read from the end?",
    ),
    "count_letter": (
        "How often does {letter} occur in {word}?", "Find the number of {letter} in the word {word}.",
        "Go through {word} and count how often {letter} appears.", "How many times does {letter} appear in {word}?",
    ),
    "find_price": (
        "How much would I pay for a {item}?", "Look up what a {item} costs.",
        "Which price is on the tag of the {item}?", "For what price is the {item} sold?",
    ),
    "travel_time": (
        "How many hours is the train ride from {origin} to {destination}?",
        "How long does it take to reach {destination} by train from {origin}?",
        "My aunt takes the train in {origin} and goes to {destination}. How many hours does she need?",
        "How many hours does a train from {origin} need until it is in {destination}?",
    ),
    "weather": (
        "How is the weather in {city}?", "What is the weather like in {city} today?", "Weather in {city}, please.",
        "Is it sunny in {city}?", "Do I need an umbrella in {city}?",
        "Will I be cold outside in {city} this afternoon?", "I fly to {city} tonight. Which weather awaits me?",
        "Is rain expected in {city}?",
    ),
}  # fmt: skip

# Of several pieces of an item, which the price list does not know by this name.
PLURAL_TRAIN = (
    "What do the {item} cost?", "How much are {item}?", "Tell me the price of the {item}.",
    "What is the price of {item}?", "How expensive are the {item}?", "I want {item}. What do I have to pay?",
    "Price for {item}, please.", "What must I spend on {item}?", "Check the price of {item}.",
    "What do you charge for {item}?", "What would {item} cost me?", "I am looking for {item}. How much are they?",
    "Are the {item} expensive?", "Find the price of {item}.", "Which price have the {item}?",
    "For how much do you sell {item}?", "How much money do I need for {item}?", "What are {item} worth in your shop?",
    "My mother needs {item}. What is the price?", "How much do {item} cost?", "Can you tell me what {item} cost?",
)  # fmt: skip
PLURAL_TEST = (
    "How much would I pay for {item}?", "Look up what {item} cost.", "Which price is on the tag of the {item}?",
    "For what price are {item} sold?", "We run out of {item}. What is the price of new ones?",
    "Before I take any {item}: how much is one?",
)  # fmt: skip

CHAT_TRAIN = (
    "Hello!",
    "Who are you?",
    "I want to hear a joke.",
    "What is your favourite colour?",
    "Thank you very much.",
    "Write a short poem.",
    "I wish you a good morning.",
    "What can you do?",
    "How are you today?",
    "Why is the sky blue?",
    "Which fruit is sweet?",
    "Say something nice.",
    "Winter is cold, isn't it?",
    "Sleep well.",
    "Why do dogs bark?",
    "Explain to me how rivers form.",
    "Is there a robot inside you?",
    "Give me some advice.",
    "Which book did you read last?",
    "Do you have a secret?",
    "I like flowers.",
    "Snow is white.",
    "Hey, what is up?",
    "Why do we build bridges?",
    "Are you happy?",
    "Thanks, that was kind.",
    "Make up a sentence with the word rain.",
    "What do you think of me?",
    "How old are you?",
    "Describe a bird to me.",
    "My sister says goodbye.",
    "Shall we have some tea?",
    "I have nothing to play.",
    "What do people do at school?",
    "Show me how you dance.",
    "Bye for now.",
    "I feel sad.",
    "I am bored.",
    "My day was long.",
    "Nice to meet you.",
    "Do you know a song?",
    "What is love?",
    "I went for a walk.",
    "Tell me what you know about horses.",
    "It is late.",
    "Let us talk about food.",
    "What makes a good teacher?",
    "Is water wet?",
    "Do fish sleep?",
    "You are funny.",
    "Can you keep quiet?",
    "Give me a riddle.",
    "Why do we dream?",
    "What is a good name for a dog?",
    "Now it is time for bed.",
    "Where do bees live?",
    "I passed my exam!",
    "Is it hard to learn to swim?",
    "Do you get tired?",
    "Okay, great.",
)
# What no tool of any kind here can do.
UNKNOWN = (
    "Book a table for two.", "Send an e-mail to my boss.", "Play the radio.", "Who won the match?", "Buy two shares.",
    "Draw a cat.", "Turn on the heating.", "Find a doctor near me.", "Cancel my subscription.", "Take a photo.",
    "What is the latest news?", "Print this page.", "Reserve a seat in the cinema.", "Delete my files.",
    "Open the door.", "Which film is on tonight?", "Rent a car for Monday.", "Start the washing machine.",
    "Post this on my page.", "Is the pharmacy open?", "Pay my electricity bill.", "Where is my parcel?",
    "Show me a map of the old town.", "Record my voice.", "Lock the garage.", "Check my blood pressure.",
    "Who wrote this letter?", "Renew my passport.", "Find a recipe with beans.", "Tell my neighbour that I am late.",
    "Move the meeting to Friday.", "Dim the lights.", "How deep is this lake?", "What is the score of the game?",
    "Scan the document.", "Read my messages to me.",
)  # fmt: skip
CHAT_TEST = (
    "Good evening!", "Do you like music?", "Tell me a story.", "Name an animal.", "Is grass green?", "Hi there.",
    "What is a mountain?", "Are you a person?", "Thanks a lot for the help.", "Write a line about the sea.",
    "How do you feel?", "What is your name?", "Tell me about cats.", "Say hello to my friend.", "Do you like summer?",
    "Recommend a hobby.", "What is a library?", "Can you sing?", "See you tomorrow.", "Tell me something funny.",
    "Have a pleasant weekend!", "Where does honey come from?", "Cheer me up, please.", "Who invented paper?",
    "Can trees talk to each other?", "That was a silly mistake of mine.", "Which season suits lazy people?",
    "Imagine you were a pirate.", "What should I cook for my children?", "My cat ignores me.",
    "Do robots need holidays?", "Give my garden a lovely name.", "How does one become a painter?",
    "I enjoy long walks.", "Are ghosts real?", "Congratulate my brother on his wedding.", "What rhymes with moon?",
    "Explain gravity to a child.", "You were a great help yesterday.", "Why do leaves fall in autumn?",
)  # fmt: skip
NEEDS_NONE = "No tool is needed for that. How can I help you?"
NONE_FITS = "I have no tool for that."


def made_up_or(rng: random.Random, values: tuple[str, ...]) -> str:
    """One of `values` or, as often as MADE_UP says, a made-up word: so that copying is learnt and no list by heart."""
    if rng.random() >= MADE_UP:
        return rng.choice(values)
    syllables = [rng.choice("bcdfghjklmnprstvwz") + rng.choice("aeiou") + rng.choice(("", *"lmnrst")) for _ in range(4)]
    word = "".join(syllables[: rng.randint(2, 4)])
    return word.capitalize() if values[0][0].isupper() else word


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
