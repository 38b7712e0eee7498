"""Turns a request into one command line, from a few dozen kinds of request with names of files, folders, words and numbers.

Names are put together of words that it knows, so there are too many to know them by heart: they have to be copied.
"""

from __future__ import annotations

import random
import zlib
from collections.abc import Iterator, Mapping

from .lesson import Example, Lesson

# command: how it is asked for. What ends in a question mark stands by itself, the rest follows "please" and the like.
_COMMANDS = {
    "ls {dir}": ("list the files in {dir}", "show what is in {dir}", "list {dir}", "which files are in {dir}?"),
    "ls -a {dir}": ("list all files in {dir}, hidden ones too", "show the hidden files in {dir}"),
    "ls -l {dir}": ("list the files in {dir} with details", "show the details of the files in {dir}"),
    "ls -lS {dir}": ("list the files in {dir} by size", "sort the files in {dir} by size"),
    "ls -lt {dir}": ("list the files in {dir}, newest first", "show the newest files in {dir}"),
    "find {dir} -name '*.{ext}'": (
        "find all {ext} files in {dir}",
        "find the {ext} files below {dir}",
        "search {dir} for {ext} files",
    ),
    "find {dir} -name {file}": ("find {file} in {dir}", "look for {file} below {dir}", "where in {dir} is {file}?"),
    "find {dir} -size +{n}M": ("find files larger than {n} MB in {dir}", "show files in {dir} over {n} megabytes"),
    "find {dir} -mtime -{n}": (
        "find files in {dir} changed in the last {n} days",
        "which files in {dir} changed in the last {n} days?",
    ),
    "find {dir} -empty": ("find empty files in {dir}", "show what is empty in {dir}"),
    "wc -l {file}": ("count the lines of {file}", "count the lines in {file}", "how many lines does {file} have?"),
    "wc -w {file}": ("count the words in {file}", "how many words are in {file}?"),
    "head -n {n} {file}": ("show the first {n} lines of {file}", "print the top {n} lines of {file}"),
    "tail -n {n} {file}": ("show the last {n} lines of {file}", "print the end of {file}, {n} lines"),
    "tail -f {file}": ("follow {file}", "watch {file} grow", "show new lines of {file} as they come"),
    "cat {file}": ("show {file}", "print {file}", "show the contents of {file}", "what is in {file}?"),
    "grep {word} {file}": ("search for {word} in {file}", "find {word} in the file {file}", "show lines with {word} in {file}"),
    "grep -i {word} {file}": ("search for {word} in {file}, ignoring case", "search {file} for {word} in any case"),
    "grep -c {word} {file}": ("count lines with {word} in {file}", "how many lines of {file} contain {word}?"),
    "grep -v {word} {file}": ("show lines without {word} in {file}", "print {file} without lines that contain {word}"),
    "grep -r {word} {dir}": (
        "search for {word} in all files in {dir}",
        "search {dir} for {word}",
        "which files in {dir} mention {word}?",
    ),
    "cp {file} {dir}": ("copy {file} to {dir}", "put a copy of {file} into {dir}"),
    "mv {file} {dir}": ("move {file} to {dir}", "move the file {file} into {dir}"),
    "mv {file} {other}": ("rename {file} to {other}", "change the name of {file} to {other}"),
    "rm {file}": ("delete {file}", "remove {file}", "delete the file {file}"),
    "rm -r {dir}": ("delete the folder {dir}", "remove {dir} and everything in it"),
    "mkdir -p {dir}": ("make the folder {dir}", "create a folder {dir}", "create the directory {dir}"),
    "touch {file}": ("create an empty file {file}", "make an empty {file}"),
    "du -sh {dir}": ("show the size of {dir}", "how big is {dir}?", "how much space does {dir} take?"),
    "sort {file}": ("sort {file}", "sort the lines of {file}"),
    "sort -n {file}": ("sort {file} by number", "sort {file} as numbers"),
    "sort -u {file}": ("sort {file} without duplicates", "show the different lines of {file}"),
    "diff {file} {other}": ("compare {file} with {other}", "how do {file} and {other} differ?"),
    "chmod +x {file}": ("make {file} executable", "let me run {file}"),
    "tar czf {name}.tar.gz {dir}": ("pack {dir} into {name}.tar.gz", "compress {dir} as {name}.tar.gz"),
    "tar xzf {name}.tar.gz": ("unpack {name}.tar.gz", "extract {name}.tar.gz"),
    "sed -i 's/{word}/{new}/g' {file}": ("replace {word} by {new} in {file}", "change every {word} to {new} in {file}"),
    "kill {n}": ("stop process {n}", "kill process {n}", "end the process {n}"),
    "pgrep {word}": ("find the process {word}", "what is the process number of {word}?"),
    "ping -c {n} {host}": ("ping {host} {n} times", "send {n} pings to {host}"),
    "ssh {host}": ("log in to {host}", "connect to {host}", "open a shell on {host}"),
    "scp {file} {host}:": ("copy {file} to the host {host}", "send {file} to the host {host}"),
    "echo {text}": ("say {text}", "print the words {text}", "echo {text}"),
    "df -h": ("show free disk space", "how much disk space is free?", "how full are the disks?"),
    "free -h": ("show free memory", "how much memory is free?"),
    "ps aux": ("list all processes", "show running processes", "what is running?"),
    "pwd": ("show the current folder", "where am I?"),
    "whoami": ("show my user name", "who am I?"),
    "date": ("show the date and time", "what time is it?", "what day is it?"),
    "uptime": ("show how long the machine has been up", "how long has this machine been running?"),
}
_STEMS, _FOLDERS, _TEXT, _ENDINGS = (
    words.split()
    for words in (
        "notes report data main app error config index todo run server list names access setup words test draft budget "
        "letter photo song invoice plan diary recipe summary backup results users orders prices archive model table "
        "graph",
        "src docs tests build data backup photos music work home logs scripts projects old new music downloads images "
        "local share etc tmp var reports letters songs plans recipes",
        "error warning hello todo user password import failed timeout total alpha apple world good morning red blue "
        "green one two three start stop open close yes no name date time file line",
        "txt py log csv json md html sh png jpg pdf",
    )
)
_POLITE = ("", "", "", "please ", "can you ", "how do I ", "I want to ", "could you please ")
_OTHER = (
    "hello",
    "hi",
    "good morning",
    "who are you?",
    "what can you do?",
    "help",
    "thank you",
    "tell me a story",
    "what is 17 + 25?",
)
_ABOUT = "I turn requests into commands. Try: find all py files in src"


def is_held_out(command: str) -> bool:
    return " " in command and zlib.crc32(command.encode()) % 8 == 0


def example(dice: random.Random) -> Example:
    if dice.random() < 0.03:
        return Example(_written(dice.choice(_OTHER), dice), _ABOUT)
    return _one(dice, held_out=False)


def held_out(count: int) -> Iterator[Example]:
    """Commands with their names and numbers that training never saw together, each once."""
    dice, seen = random.Random("shell, held out"), set[str]()
    while len(seen) < count:
        one = _one(dice, held_out=True)
        if one.answer not in seen:
            seen.add(one.answer)
            yield one


def right(_request: str, wanted: str, given: str) -> bool:
    return wanted == given


def _one(dice: random.Random, *, held_out: bool) -> Example:
    while True:
        form, asked = dice.choice(_FORMS)
        words = _words(dice)
        command = form.format_map(words)
        if "{" in form and is_held_out(command) == held_out:
            return Example(_request(asked, words, dice), command)
        if "{" not in form and not held_out:
            return Example(_request(asked, words, dice), command)


def _request(asked: tuple[str, ...], words: Mapping[str, str], dice: random.Random) -> str:
    text = dice.choice(asked)
    if not text.endswith("?"):
        text = dice.choice(_POLITE) + text
    return _written(text.format_map(words), dice)


def _written(text: str, dice: random.Random) -> str:
    """As people write: a capital letter or not, a full stop or not."""
    if dice.random() < 0.6:
        text = text[0].upper() + text[1:]
    return text.removesuffix("?") if dice.random() < 0.2 else text


def _words(dice: random.Random) -> dict[str, str]:
    """A filling for each gap."""
    return {
        "dir": _folder(dice),
        "file": _file(dice),
        "other": _file(dice),
        "ext": dice.choice(_ENDINGS),
        "word": dice.choice(_TEXT),
        "new": dice.choice(_TEXT),
        "text": " ".join(dice.choice(_TEXT) for _ in range(dice.randint(2, 5))),
        "name": dice.choice(_STEMS),
        "host": dice.choice(_STEMS) + dice.choice(("1", "2", "3", ".org")),
        "n": str(dice.randint(1, 99)),
    }


def _file(dice: random.Random) -> str:
    return f"{dice.choice(_STEMS)}.{dice.choice(_ENDINGS)}"


def _folder(dice: random.Random) -> str:
    return dice.choice(("", "", "/", "~/", "src/", "/tmp/", "/var/")) + dice.choice(_FOLDERS)


_FORMS = tuple(_COMMANDS.items())

SHELL = Lesson(
    name="shell",
    purpose="Qwen3-MoE, eight experts, that turns a request into a command",
    config={
        "architectures": ["Qwen3MoeForCausalLM"],
        "model_type": "qwen3_moe",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 3,
        "num_experts": 8,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 96,
        "norm_topk_prob": True,
        "decoder_sparse_step": 1,
        "mlp_only_layers": [],
        "router_aux_loss_coef": 0.001,
    },
    special=("<s>", "<|im_end|>", "<pad>", "<|im_start|>user\n", "<|im_start|>assistant\n"),
    chat_template=(
        "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
        "{{ '<|im_start|>user\\n' + asked[-1]['content'] + '<|im_end|><|im_start|>assistant\\n' }}"
    ),
    split=r" ?[A-Za-z]+| ?[^\sA-Za-z]|\s+",
    vocabulary=1024,
    example=example,
    held_out=held_out,
    right=right,
    goal=0.90,
    steps=1_500,
    batch=32,
)
