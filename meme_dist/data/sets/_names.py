"""The digits' English names, as a modality: written letter by letter, so that generating one is a task of several tokens."""

from meme_dist.data.fields import SPECIAL, Field

NAMES = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine")
SPELLED = tuple(" ".join(name) for name in NAMES)  # letters are the words of the text
LETTERS = tuple(sorted(set("".join(NAMES))))
LONGEST = max(map(len, NAMES))


def name_field() -> Field:
    """Token ids [6]: up to five letters, then `<eos>`, then padding."""
    return Field(
        kind="text",
        shape=(LONGEST + 1,),
        codec="txt",
        likelihood="categorical",
        vocabulary=(*SPECIAL, *LETTERS),
    )
