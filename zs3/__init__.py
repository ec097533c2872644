"""The lab half: data, training, evaluation, release. `zs3 NAME` runs a command (`zs3.__main__` lists them)."""

import sys
from importlib.abc import InspectLoader
from importlib.machinery import ModuleSpec
from importlib.util import spec_from_loader


class OldCommand(InspectLoader):
    """Runs a command by its old spelling, `python -m zs3.check`, and prints the new one, `zs3 check`."""

    @classmethod
    def find_spec(cls, name: str, path: object = None, target: object = None) -> ModuleSpec | None:
        package, _, command = name.partition(".")
        if package != "zs3":  # Python asks for every module that it does not find
            return None
        from zs3.__main__ import COMMANDS

        return spec_from_loader(name, cls()) if command in {known for known, *_ in COMMANDS} else None

    def get_source(self, name: str) -> str:
        if name in sys.modules:  # an import: it registers a module before it runs it
            raise ModuleNotFoundError(f"there is no module {name} any more: its command is `zs3 {name[4:]}`")
        return (
            f"from zs3.__main__ import run_old_command\n\nif __name__ == '__main__':\n    run_old_command({name!r})\n"
        )


sys.meta_path.append(OldCommand)
