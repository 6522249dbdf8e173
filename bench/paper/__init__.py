"""The paper's tables and figures from whole trainings: `python -m bench paper tab1 --scale small --data PATH`.

`experiments` lists the trainings, `runner` runs them, `networks` looks at the trained networks, `numbers` has the
paper's, `tables` puts ours beside them.
"""

from bench.paper.command import add_command

__all__ = ["add_command"]
