"""Sections: so many heads are worked on at a time that what their blocks read again stays in L2.  [floor 0]"""

L2_BYTES = 32 << 20  # of it, that they may take


def heads_a_section(heads: int, bytes: int) -> int:
    """How many of `heads`, each of which has so many bytes that are read again and again.

    All sections have as many, as nearly as can be: under a causal mask a last one of few heads begins with long blocks
    when all others are done (36 heads of N=2500, d=112: 29 and 7 took 1.25 times as long as 18 and 18, on an H100).
    """
    most = max(1, L2_BYTES // max(1, bytes))
    return -(-heads // max(1, -(-heads // most)))
