"""`moezoo completion`: a shell script that completes commands and options."""

import argparse
from collections.abc import Iterator
from typing import Any

from moezoo.cli.options import add_command
from moezoo.cli.output import DONE

SCRIPT = """\
_moezoo() {{
  local word command=moezoo current=${{COMP_WORDS[COMP_CWORD]}}
  for word in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
    case "$command $word" in
{paths}
    esac
  done
  case "$command:${{COMP_WORDS[COMP_CWORD-1]}}" in
{values}
  esac
  case "$command" in
{words}
  esac
}}
complete -o default -o bashdefault -F _moezoo moezoo
"""


def add(commands: Any) -> None:
    parser = add_command(
        commands,
        "completion",
        _completion,
        help="print what a shell needs to complete commands and options",
        description="Print a script that completes the commands, options and choices of moezoo.",
        examples="""
completion bash >> ~/.bashrc
completion zsh >> ~/.zshrc
""",
    )
    parser.add_argument("shell", choices=("bash", "zsh"))


def _completion(arguments: argparse.Namespace) -> int:
    from moezoo.cli import parser

    if arguments.shell == "zsh":
        print("autoload -U +X bashcompinit && bashcompinit")
    print(script(parser()), end="")
    return DONE


def script(parser: argparse.ArgumentParser) -> str:
    """Return the bash script that completes everything `parser` takes."""
    paths, values, words = [], [], []
    for command, its in _commands("moezoo", parser):
        offered = [option for action in its._actions for option in action.option_strings]
        for action in its._actions:
            if isinstance(action, argparse._SubParsersAction):
                offered += action.choices
                paths += [
                    f'      "{command} {name}") command="{command} {name}" ;;'
                    for name in action.choices
                ]
            elif action.choices and action.option_strings:
                patterns = " | ".join(f'"{command}:{option}"' for option in action.option_strings)
                choices = " ".join(map(str, action.choices))
                values.append(f"    {patterns}) {_reply(choices)}; return ;;")
            elif action.choices:
                offered += map(str, action.choices)
        words.append(f'    "{command}") {_reply(" ".join(offered))} ;;')
    return SCRIPT.format(paths="\n".join(paths), values="\n".join(values), words="\n".join(words))


def _reply(words: str) -> str:
    return f"""COMPREPLY=($(compgen -W "{words}" -- "$current"))"""


def _commands(
    name: str, parser: argparse.ArgumentParser
) -> Iterator[tuple[str, argparse.ArgumentParser]]:
    yield name, parser
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            for below, its in action.choices.items():
                yield from _commands(f"{name} {below}", its)
