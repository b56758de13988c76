"""One file per question; `python -m experiments list` names them."""
