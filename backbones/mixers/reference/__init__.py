"""What each mixer is by its paper: token by token in float64, on the mixer's own parameters, in plain torch only.

Law 12 holds every registered mixer to its `reference(mixer, config, x, causal)`. A reference is written from the
equations, not from the mixer, and calls neither `omnimix.kernels` nor what the mixer is made of. It reads weights from
the mixer, and options from the configuration: what a constructor makes of these may be the mistake.
"""
