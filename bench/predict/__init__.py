"""Predicted times of the package's kernels on GPUs that are not here: `python -m bench predict`.

`machines.py` has what data sheets say of a GPU, `machine_code.py` reads the loops of a compiled kernel, `work.py` calls
the operators on tensors without memory and notes what they would launch, `formula.py` turns a launch into microseconds,
`command.py` prints the tables and writes the rows. Nothing here is measured.
"""
