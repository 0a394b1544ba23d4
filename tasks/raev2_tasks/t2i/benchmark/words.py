"""The words of the track TXT: invented ones from a grammar, and short real ones. No word has a Q."""

from __future__ import annotations

import functools
import zlib

import numpy as np

ALPHABET = "ABCDEFGHIJKLMNOPRSTUVWXYZ"  # O and Q are the only letters that a scorer of small pictures confuses
VOWELS = "AEIOU"
CONSONANTS = "".join(letter for letter in ALPHABET if letter not in VOWELS)
NUM_INVENTED = 20_000
LENGTHS = (2, 6)

TRAINING_REAL = """
    able air also area army away baby back ball bank base bath beach best big bill bird black boat body book born both
    box boy bread busy buy cake call camp card care cell chair check child city class clean clock close cloud club coat
    code coffee cold cook cool corn cost cup dance dark data day deal deep desk dinner dish door down draw dress drink
    drive dry dust early earth east easy edge end enjoy enter even ever exit eye face fact fair fall family farm fast
    father field film find fine fire first five flat floor flower fly food foot form four free fresh friend fruit full
    fun game garden gate gift girl give glad glass go gold good grass great group grow hair half hall hand happy hard
    hat head health heart heat help here high hill hold home honey hope hot hour house ice idea in iron island it jar
    job join joy juice jump just keep key kind king kiss knee know lake lamp land large last late law lead leaf learn
    left letter level life light line list live long look lost love low luck lunch make many map mark market may meal
    meet milk mind mix money month moon more most mother mouth move music name near neck new next nice night no noise
    north nose note now oak ocean off oil old on once one open or other out oven over own page paint paper park part
    path peace pen phone photo piano plan plate play plus pocket point poor pot power price proud pull push put radio
    rain read ready rest rice rich right river road rock roof room root rope rule run safe salt same sand save school
    sea seat seed self send seven shade shine ship shoe shop short show side sign silk sing sister six size skin sky
    sleep slow smile snow so soap sock soft soil song soon soul sound soup south space spoon sport spring stair stand
    start stay steel step stone stop store storm story street strong study such sugar sun sure sweet swim table tail
    talk tall taxi tea team ten tent test text thing time tired to today tool top touch town toy trade train travel
    tree trip true try turn two uncle under unit up use vast very view visit voice wait walk wall want warm
    wash watch water wave way wealth week well west wet wheel while wide wife wild win wind window wine winter wish
    with wood word work world year yes young your zero zone
""".upper().split()  # noqa: SIM905

# Names of colours, shapes and animals; training shows none of them.
HELD_OUT_REAL = """
    red orange yellow green blue purple pink brown white grey violet indigo teal cyan beige amber
    circle oval cube cone cross star ring arrow sphere spiral
    cat dog horse sheep cow bear zebra lion tiger wolf fox deer moose rabbit hare mouse rat bat
    goat pig donkey mule camel llama monkey ape panda koala otter beaver badger weasel ferret
    whale shark seal walrus fish trout salmon tuna cod crab shrimp clam snail slug
    worm ant bee wasp moth beetle spider frog toad newt lizard snake turtle
    eagle hawk falcon owl crow raven dove swan goose duck robin heron stork parrot
""".upper().split()  # noqa: SIM905


def held_out(word: str) -> bool:
    """One invented word in a hundred."""
    return zlib.crc32(word.encode("ascii")) % 100 == 0


@functools.cache
def invented() -> tuple[str, ...]:
    """20,000 words of alternating consonants and vowels, 2 to 6 letters, in a fixed order."""
    rng = np.random.default_rng(14)
    words: dict[str, None] = {}
    while len(words) < NUM_INVENTED:
        length, first = int(rng.integers(LENGTHS[0], LENGTHS[1] + 1)), int(rng.integers(2))
        letters = rng.integers(1 << 30, size=length)
        sets = [(CONSONANTS, VOWELS)[(first + place) % 2] for place in range(length)]
        words["".join(choice[number % len(choice)] for choice, number in zip(sets, letters, strict=True))] = None
    real = {*TRAINING_REAL, *HELD_OUT_REAL}
    return tuple(word for word in words if word not in real)


@functools.cache
def training() -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Invented and real words that training may show."""
    real = dict.fromkeys(word for word in TRAINING_REAL if word not in HELD_OUT_REAL and not held_out(word))
    return tuple(word for word in invented() if not held_out(word)), tuple(real)
