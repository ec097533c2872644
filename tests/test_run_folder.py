"""zs3/run_folder.py: what a run leaves in its output folder, and what it takes up again."""

import pytest

from zs3.command_line import InputError
from zs3.run_folder import Progress


def test_a_run_is_resumed_with_as_many_processes_as_it_began_with():
    state = Progress(1).state_dict()
    with pytest.raises(InputError, match="started with 1 processes"):
        Progress(2).load_state_dict(state)
