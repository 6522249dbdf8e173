"""Tables of the paper and of the operators, each from one command: `python -m bench list` names them."""
