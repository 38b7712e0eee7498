"""A small byte-level BPE tokenizer, trained on text that this module makes up.

Two vocabularies: `english` has words that people type, `other` none of them. Knows no file and no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers

BOS, EOS, PAD, TURN, TURN_END = SPECIAL = ("<s>", "</s>", "<pad>", "<|im_start|>", "<|im_end|>")
"""In the order of their ids, from 0."""

CHAT_TEMPLATE = (
    "{{ bos_token }}"
    "{% for message in messages %}"
    "{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
"""Writes `<s>` itself, and the tokenizer adds one too, as Llama's do: a rendered chat is tokenised without special tokens."""

_ENGLISH = """
the of and to a in is it you that he was for on are with as his they be at one have this from or had by hot but some what
there we can out other were all your when up use word how said an each she which do their time if will way about many then
them would write like so these her long make thing see him two has look more day could go come did my sound no most number
who over know water than call first people may down side been now find any new work part take get place made live where
after back little only round man year came show every good me give our under name very through just form much great think
say help low line before turn cause same mean differ move right boy old too does tell sentence set three want air well also
play small end put home read hand port large spell add even land here must big high such follow act why ask men change went
light kind off need house picture try us again animal point mother world near build self earth father head stand own page
should country found answer school grow study still learn plant cover food sun four thought let keep eye never last door
between city tree cross since hard start might story saw far sea draw left late run while press close night real life few
stop open seem together next white children begin got walk example ease paper often always music those both mark book letter
until mile river car feet care second group carry took rain eat room friend began idea fish mountain north once base hear
horse cut sure watch color face wood main enough plain girl usual young ready above ever red list though feel talk bird soon
body dog family direct pose leave song measure state product black short class wind question happen complete ship area half
rock order fire south problem piece told knew pass farm top whole king size heard best hour better true during hundred five
remember step early hold west ground interest reach fast sing listen six table travel less morning ten simple several vowel
toward war lay against pattern slow center love person money serve appear road map science rule govern pull cold notice
voice fall power town fine certain fly unit lead cry dark machine note wait plan figure star box noun field rest correct
able pound done beauty drive stood contain front teach week final gave green quick develop sleep warm free minute strong
special mind behind clear tail produce fact street inch lot nothing course stay wheel full force blue object decide surface
deep moon island foot yet busy test record boat common gold possible plane age dry wonder laugh thousand ago ran check game
shape yes cool miss brought heat snow bed bring sit perhaps fill east weight language among
"""

_SYLLABLES = ["".join(parts) for parts in product("bdfgklmnprstvz", "aeiou", ("", "l", "n", "r", "s"))]
_SENTENCES = 4_000


def train(name: str, size: int, seed: int) -> Tokenizer:
    """The tokenizer of the vocabulary `name` with exactly `size` tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=list(SPECIAL),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    # Seeded by text: Python hashes it the same way everywhere and always.
    tokenizer.train_from_iterator(_sentences(name, random.Random(f"{name}/{seed}")), trainer)
    if tokenizer.get_vocab_size() != size:
        raise AssertionError(f"the text of vocabulary {name} yields {tokenizer.get_vocab_size()} tokens, not {size}")
    tokenizer.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, SPECIAL.index(BOS))])
    return tokenizer


def unspoken(tokenizer: Tokenizer) -> list[int]:
    """The tokens that say nothing a person can read alone: control tokens, and bytes that are only part of a character.

    The two that end an answer are not among them.
    """
    ends = {tokenizer.token_to_id(EOS), tokenizer.token_to_id(TURN_END)}
    return [t for t in range(tokenizer.get_vocab_size()) if t not in ends and not _readable(tokenizer.decode([t]))]


def _readable(text: str) -> bool:
    return text.strip() != "" and text.isprintable() and "\N{REPLACEMENT CHARACTER}" not in text


def _sentences(name: str, dice: random.Random) -> Iterator[str]:
    invented = ["".join(dice.choices(_SYLLABLES, k=dice.randint(2, 3))) for _ in range(900)]
    words = [*_ENGLISH.split(), *invented[:300]] if name == "english" else invented
    # Zipf's law: a few words are everywhere, most are rare.
    weights = [1 / rank for rank in range(1, len(words) + 1)]
    for _ in range(_SENTENCES):
        sentence = dice.choices(words, weights, k=dice.randint(4, 12))
        if dice.random() < 0.2:
            sentence[dice.randrange(len(sentence))] = str(dice.randrange(3000))
        if dice.random() < 0.3:
            sentence[dice.randrange(len(sentence) - 1)] += ","
        yield " ".join(sentence).capitalize() + dice.choice(".....?!")
