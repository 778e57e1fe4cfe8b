"""`make prove-gpu`: one command that proves lorafit on the card at hand in about ten minutes, without the hub.

    make prove-gpu                    all stages; ends with the line PROVEN, or with exit 1 at the first bound missed
    STAGE=values make prove-gpu       one stage, or several: STAGE=card,kernels
    PROVE_DEVICE=cpu make prove-gpu   the small mode: every stage but speed, tiny shapes, on a CPU

    card      what the card is, what it multiplies, which attention kernels a run takes there
    kernels   lorafit's operations against fp64, NF4 codes of the card against a CPU's
    values    losses and gradients of the card against a CPU's, and against the card's own in another way
    resume    a run killed with SIGKILL and resumed, twice; its merge on the card and on a CPU
    memory    what the steps took against both engines of the memory estimate
    waits     how often a step makes the host wait for the device
    speed     tokens a second beside TRL, TRL with Liger and packing, and Unsloth, where they are installed

A stage is a function of one module that yields what it finds: each figure with its bound, and what it had to leave out.
"""
