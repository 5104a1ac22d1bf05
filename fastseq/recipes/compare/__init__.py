"""``fastseq compare``: the same training in several variants, measured side by side on a noisy machine.

    levers.py      what can be switched, what it changes besides speed, and why it is not tried here
    variant.py     variants that take turns on the same examples      cost.py  their operator calls and memory
    comparison.py  the waterfall, each other lever alone, and the quality      around.py  what happens around the steps
    show.py  plot.py  the figures as tables and as a drawing       encoders.py  what recipes with a text encoder share

A recipe's comparison.py says which levers it has, how its plain version is made, and what else it measures.
"""
