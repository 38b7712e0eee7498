"""`chimera completion bash|zsh`: a script that completes verbs, options and their choices, made of the parsers themselves.

It is a list of words and asks nothing when the tab key is pressed: starting Python then would take longer than typing.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Iterator

_SCRIPT = """\
# chimera's words, made by `chimera completion {shell}`.
{prelude}_chimera() {{
  local cur="${{COMP_WORDS[COMP_CWORD]}}" before="${{COMP_WORDS[COMP_CWORD - 1]}}" word path="" words=""
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD - 1}}"; do
    [[ $word == -* ]] || path="$path $word"
    [[ $path != " "*" "*" "* ]] || break
  done
  case "$path/$before" in
{choices}
  esac
  if [[ -z $words ]]; then
    case "$path" in
{verbs}
    esac
  fi
  # Options only where one was begun: else nothing of ours may be meant, and the shell offers files.
  [[ $cur == -* ]] || words=" $words" words="${{words%% -*}}"
  COMPREPLY=($(compgen -W "$words" -- "$cur"))
}}
complete -o default -F _chimera chimera
"""
_ZSH = "autoload -U +X bashcompinit && bashcompinit\n"


def configure(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("shell", choices=("bash", "zsh"), help="which shell")


def run(arguments: argparse.Namespace) -> int:
    from chimera.cli.main import make_parser  # which knows this module

    print(script(make_parser(), arguments.shell), end="")
    return 0


def script(parser: argparse.ArgumentParser, shell: str) -> str:
    choices: list[str] = []
    verbs: list[str] = []
    for path, words, options in _levels(parser, ""):
        # The deepest first: what stands behind a verb begins with the verb itself.
        verbs.insert(0, f"      {_pattern(path)}) words={shlex.quote(' '.join(words))} ;;")
        for flag, values in options.items():
            choices.append(f"    {_pattern(path)}/{flag}) words={shlex.quote(' '.join(values))} ;;")
    return _SCRIPT.format(
        shell=shell, prelude=_ZSH if shell == "zsh" else "", choices="\n".join(choices), verbs="\n".join(verbs)
    )


def _levels(parser: argparse.ArgumentParser, path: str) -> Iterator[tuple[str, list[str], dict[str, list[str]]]]:
    """Each verb's words before it, what may follow, and what each option with choices may be."""
    words: list[str] = []
    flags: list[str] = []
    options: dict[str, list[str]] = {}
    below: dict[str, argparse.ArgumentParser] = {}
    for action in parser._actions:  # argparse has no public way to ask
        flags += action.option_strings
        choices = [str(choice) for choice in action.choices or ()]
        if isinstance(action, argparse._SubParsersAction):
            below = action.choices
        if action.option_strings and choices:
            options |= dict.fromkeys(action.option_strings, choices)
        elif not action.option_strings:
            words += choices
    yield path, words + flags, options
    for name, verb in below.items():
        yield from _levels(verb, f"{path} {name}")


def _pattern(path: str) -> str:
    """What comes after the verb, a model or a file, changes nothing."""
    return f'"{path}"*' if path else '""'
